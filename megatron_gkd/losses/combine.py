"""Comparisons made of others: a weighted sum that shares collectives, and a limit on the loss of a token.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks, P = details.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_gkd.losses.comparison import Comparison, Joined, Rounds, side_by_side


class Term(NamedTuple):
    """A summand; ``name`` is the name of its own loss among the details."""

    name: str
    weight: float
    comparison: Comparison


@dataclass(frozen=True)
class Sum(Comparison):
    """sum_i weight_i loss_i of the same student logits; the target is a ``Joined`` of theirs.

    Round n of all terms is one all-gather. stats = the terms' losses, then each one's stats.
    """

    terms: tuple[Term, ...]

    def rounds(self, student_TV: Tensor, targets: Joined) -> Rounds:
        """See ``Comparison``."""
        results = yield from side_by_side(
            [
                term.comparison.rounds(student_TV, target)
                for term, target in zip(self.terms, targets, strict=True)
            ]
        )
        losses, stats = zip(*results, strict=True)
        total_T = torch.zeros_like(losses[0])
        for term, loss_T in zip(self.terms, losses, strict=True):
            total_T = total_T + term.weight * loss_T
        return total_T, torch.cat([torch.stack(losses, -1), *stats], -1)

    def num_stats(self, targets: Joined) -> int:
        """See ``rounds``."""
        return len(self.terms) + sum(self._widths(targets))

    def gradient(self, student_TV: Tensor, targets: Joined, stats_TK: Tensor, upstream_T: Tensor) -> Tensor:
        """The sum of the terms' gradients."""
        parts = zip(self.terms, targets, self._split(stats_TK, targets), strict=True)
        grads = (
            term.comparison.gradient(student_TV, target, term_stats_TK, term.weight * upstream_T)
            for term, target, term_stats_TK in parts
        )
        total_TV = next(grads)
        for grad_TV in grads:
            total_TV.add_(grad_TV)
        return total_TV

    def write_gradient(
        self, student_TV: Tensor, targets: Joined, stats_TK: Tensor, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        """See ``Comparison``; several terms need the same logits, so only a single one writes in one go."""
        term, *others = self.terms
        if others:
            super().write_gradient(student_TV, targets, stats_TK, upstream_T, out_TV)
        else:
            weighted_T = term.weight * upstream_T
            term.comparison.write_gradient(student_TV, targets[0], stats_TK[:, 1:], weighted_T, out_TV)

    def differentiate_rounds_(self, student_TV: Tensor, targets: Joined, upstream_T: Tensor) -> Rounds:
        """See ``Comparison``; several terms need the same logits, so only a single one may work in their storage."""
        term, *others = self.terms
        if others:
            return (yield from super().differentiate_rounds_(student_TV, targets, upstream_T))
        weighted_T = term.weight * upstream_T
        loss_T, stats_TK = yield from term.comparison.differentiate_rounds_(
            student_TV, targets[0], weighted_T
        )
        return term.weight * loss_T, torch.cat([loss_T.unsqueeze(-1), stats_TK], -1)

    @property
    def detail_names(self) -> tuple[str, ...]:
        """The terms, then what each of them tells."""
        inner = [name for term in self.terms for name in term.comparison.detail_names]
        return tuple([term.name for term in self.terms] + inner)

    def details(self, stats_TK: Tensor, targets: Joined) -> Tensor:
        """Each term's loss without its weight, then its own details."""
        parts = zip(self.terms, targets, self._split(stats_TK, targets), strict=True)
        inner = [term.comparison.details(part_TK, target) for term, target, part_TK in parts]
        return torch.cat([stats_TK[:, : len(self.terms)], *inner], -1)

    def _widths(self, targets: Joined) -> list[int]:
        return [term.comparison.num_stats(target) for term, target in zip(self.terms, targets, strict=True)]

    def _split(self, stats_TK: Tensor, targets: Joined) -> tuple[Tensor, ...]:
        return stats_TK[:, len(self.terms) :].split(self._widths(targets), -1)


@dataclass(frozen=True)
class Limited(Comparison):
    """A loss of at most ``limit`` per token, in absolute value; a token beyond it has gradient 0.

    stats = whether the token is beyond, then those of the inner comparison.
    """

    inner: Comparison
    limit: float

    def rounds(self, student_TV: Tensor, target: Any) -> Rounds:
        """See ``Comparison``."""
        loss_T, stats_TK = yield from self.inner.rounds(student_TV, target)
        return self._limited(loss_T, stats_TK)

    def num_stats(self, target: Any) -> int:
        """One more than the inner comparison."""
        return 1 + self.inner.num_stats(target)

    def write_gradient(
        self, student_TV: Tensor, target: Any, stats_TK: Tensor, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        """That of the inner comparison, but exactly 0 beyond the limit, where it may be infinite."""
        self.inner.write_gradient(student_TV, target, stats_TK[:, 1:], upstream_T, out_TV)
        out_TV.masked_fill_(stats_TK[:, :1] != 0, 0.0)

    def differentiate_rounds_(self, student_TV: Tensor, target: Any, upstream_T: Tensor) -> Rounds:
        """See ``Comparison``."""
        inner = yield from self.inner.differentiate_rounds_(student_TV, target, upstream_T)
        loss_T, stats_TK = self._limited(*inner)
        student_TV.masked_fill_(stats_TK[:, :1] != 0, 0.0)
        return loss_T, stats_TK

    @property
    def detail_names(self) -> tuple[str, ...]:
        """Whether a token is beyond the limit; its mean is the share of such tokens."""
        return ("limited_share", *self.inner.detail_names)

    def details(self, stats_TK: Tensor, target: Any) -> Tensor:
        """See ``detail_names``."""
        return torch.cat([stats_TK[:, :1], self.inner.details(stats_TK[:, 1:], target)], -1)

    def _limited(self, loss_T: Tensor, stats_TK: Tensor) -> tuple[Tensor, Tensor]:
        is_beyond_T1 = (loss_T.abs() > self.limit).unsqueeze(-1)
        return loss_T.clamp(-self.limit, self.limit), torch.cat(
            [is_beyond_T1.to(stats_TK.dtype), stats_TK], -1
        )
