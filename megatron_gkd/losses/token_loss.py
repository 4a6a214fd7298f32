"""The loss of each token from its logits and a target, with the collectives of a split vocabulary.

Where the logits come from is not known here: ``fused_linear`` passes slices of given logits, or chunks that it computes
from hidden states. All arithmetic is float32 (float64 for float64 student logits).

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.vocab_parallel import row_blocks, row_pieces
from megatron_gkd.parallel.gathering import Group, Rounds, run_rounds, side_by_side

METRIC_UNITS = {
    "divergence": "nats/token",
    "cross_entropy": "nats/token",
    "limited_share": "1",
    "forward_weight": "1",
    "retained_mass": "1",
    "variance": "nats^2/token",
}
"""Metrics that losses report beside their value, means over tokens, with their units."""


def rows_of(values: Any, rows: slice) -> Any:
    """Some rows of a tensor, or of every tensor in a tuple, however deep; ``None`` stays."""
    if isinstance(values, tuple):
        return rebuilt(values, [rows_of(part, rows) for part in values])
    return values if values is None else values[rows]


def joined_rows(parts: Sequence[Any]) -> Any:
    """``rows_of`` reversed: at least one block of rows after the other."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, tuple):
        return rebuilt(first, [joined_rows(column) for column in zip(*parts, strict=True)])
    return torch.cat(list(parts))


def rebuilt(like: tuple, parts: Sequence[Any]) -> Any:
    """A tuple of these parts, of the same named type as ``like``."""
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


@dataclass(frozen=True)
class TokenLoss(ABC):
    """A loss per token of the student's logits [T, V], against a target.

    ``rounds`` and ``measure`` return (loss_T in nats, saved): what the gradient needs beside the logits, a tensor or a
    tuple of tensors with a row for each token, equal on all ranks or this rank's part. The gradient is local: a backward
    pass never communicates. A subclass overrides ``gradient``, for pieces of rows, or ``write_gradient``.

    Attributes:
        group: Ranks that the vocabulary is split over, or ``None``.
        metric_names: Names of ``metrics``, keys of ``METRIC_UNITS``.
    """

    group: Group
    metric_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def rounds(self, student_TV: Tensor, target: Any, /) -> Rounds:
        """The collectives of ``measure``, one ``yield`` each; the logits are not modified."""

    def gradient(self, student_TV: Tensor, target: Any, saved: Any, upstream_T: Tensor, /) -> Tensor:
        """[T, V] upstream * d loss / d logits of the student, in the accumulation dtype. Allocates a few [T, V]."""
        grad_TV = torch.empty_like(student_TV, dtype=upstream_T.dtype)
        self.write_gradient(student_TV, target, saved, upstream_T, grad_TV)
        return grad_TV

    def write_gradient(
        self, student_TV: Tensor, target: Any, saved: Any, upstream_T: Tensor, out_TV: Tensor, /
    ) -> None:
        """``gradient`` into ``out_TV`` of any float dtype, which may be the storage of ``student_TV``."""
        for rows in row_pieces(student_TV):
            piece, of_piece = rows_of((target, saved), rows)
            out_TV[rows] = self.gradient(student_TV[rows], piece, of_piece, upstream_T[rows])

    def metrics(self, saved: Any, /) -> tuple[Tensor, ...]:
        """[T] for each of ``metric_names``."""
        return ()

    def measure(self, student_TV: Tensor, target: Any, /) -> tuple[Tensor, Any]:
        """(loss_T, saved); the logits are not modified."""
        return run_rounds(self.rounds(student_TV, target), self.group)

    def differentiate_(self, student_TV: Tensor, target: Any, upstream_T: Tensor, /) -> tuple[Tensor, Any]:
        """As ``measure``; the student's logits become their gradient, in their dtype, a teacher's logits are scratch."""
        runs = (
            self.differentiate_rounds_(student_TV[block], rows_of(target, block), upstream_T[block])
            for block in row_blocks(student_TV, self.group)
        )
        return joined_rows([run_rounds(run, self.group) for run in runs])

    def differentiate_rounds_(self, student_TV: Tensor, target: Any, upstream_T: Tensor, /) -> Rounds:
        """The collectives of ``differentiate_`` for rows that share them; it leaves the gradient when they are over."""
        loss_T, saved = yield from self.rounds(student_TV, target)
        self.write_gradient(student_TV, target, saved, upstream_T, student_TV)
        return loss_T, saved


class Term(NamedTuple):
    """A summand of a loss; its own value is the metric ``name``."""

    name: str
    weight: float
    loss: TokenLoss


@dataclass(frozen=True)
class TermSum(TokenLoss):
    """sum_i weight_i loss_i of the same student logits; the target is a tuple of theirs.

    Round n of all terms is one all-gather. saved = (losses of the terms, saved of each).
    """

    terms: tuple[Term, ...]

    @override
    def rounds(self, student_TV: Tensor, target: tuple) -> Rounds:
        pairs = zip(self.terms, target, strict=True)
        results = yield from side_by_side([term.loss.rounds(student_TV, part) for term, part in pairs])
        losses, saved = zip(*results, strict=True)
        return self._total(losses), (losses, saved)

    @override
    def gradient(self, student_TV: Tensor, target: tuple, saved: Any, upstream_T: Tensor) -> Tensor:
        parts = zip(self.terms, target, saved[1], strict=True)
        grads = (
            term.loss.gradient(student_TV, part, of_term, term.weight * upstream_T)
            for term, part, of_term in parts
        )
        total_TV = next(grads)
        for grad_TV in grads:
            total_TV.add_(grad_TV)
        return total_TV

    @override
    def write_gradient(
        self, student_TV: Tensor, target: tuple, saved: Any, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        term, *others = self.terms
        if others:  # several terms read the same logits, so none of them may write to their storage
            super().write_gradient(student_TV, target, saved, upstream_T, out_TV)
        else:
            weighted_T = term.weight * upstream_T
            term.loss.write_gradient(student_TV, target[0], saved[1][0], weighted_T, out_TV)

    @override
    def differentiate_rounds_(self, student_TV: Tensor, target: tuple, upstream_T: Tensor) -> Rounds:
        term, *others = self.terms
        if others:
            return (yield from super().differentiate_rounds_(student_TV, target, upstream_T))
        weighted_T = term.weight * upstream_T
        loss_T, saved = yield from term.loss.differentiate_rounds_(student_TV, target[0], weighted_T)
        return self._total((loss_T,)), ((loss_T,), (saved,))

    @property
    @override
    def metric_names(self) -> tuple[str, ...]:
        inner = [name for term in self.terms for name in term.loss.metric_names]
        return tuple([term.name for term in self.terms] + inner)

    @override
    def metrics(self, saved: Any) -> tuple[Tensor, ...]:
        losses, of_terms = saved
        parts = zip(self.terms, of_terms, strict=True)
        return (*losses, *(metric_T for term, of_term in parts for metric_T in term.loss.metrics(of_term)))

    def _total(self, losses: Sequence[Tensor]) -> Any:
        return sum(term.weight * loss_T for term, loss_T in zip(self.terms, losses, strict=True))


@dataclass(frozen=True)
class LimitedLoss(TokenLoss):
    """A loss of at most ``limit`` per token, in absolute value; a token beyond it has gradient 0.

    saved = (whether the token is beyond, saved of the inner loss).
    """

    inner: TokenLoss
    limit: float

    @override
    def rounds(self, student_TV: Tensor, target: Any) -> Rounds:
        loss_T, saved = yield from self.inner.rounds(student_TV, target)
        return loss_T.clamp(-self.limit, self.limit), (loss_T.abs() > self.limit, saved)

    @override
    def write_gradient(
        self, student_TV: Tensor, target: Any, saved: Any, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        is_beyond_T, of_inner = saved
        self.inner.write_gradient(student_TV, target, of_inner, upstream_T, out_TV)
        # a factor 0 would keep the NaN of an infinite loss
        out_TV.masked_fill_(is_beyond_T.unsqueeze(-1), 0.0)

    @override
    def differentiate_rounds_(self, student_TV: Tensor, target: Any, upstream_T: Tensor) -> Rounds:
        loss_T, of_inner = yield from self.inner.differentiate_rounds_(student_TV, target, upstream_T)
        is_beyond_T = loss_T.abs() > self.limit
        student_TV.masked_fill_(is_beyond_T.unsqueeze(-1), 0.0)
        return loss_T.clamp(-self.limit, self.limit), (is_beyond_T, of_inner)

    @property
    @override
    def metric_names(self) -> tuple[str, ...]:
        return ("limited_share", *self.inner.metric_names)

    @override
    def metrics(self, saved: Any) -> tuple[Tensor, ...]:
        is_beyond_T, of_inner = saved
        return (is_beyond_T.float(), *self.inner.metrics(of_inner))
