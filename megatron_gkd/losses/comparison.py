"""Compare rows of a student's logits over a split vocabulary with a target: value, and gradient of the logits.

Nothing here knows where the logits come from: ``distill`` passes slices of given logits, ``linear`` passes chunks that
it makes from hidden states. A comparison has three entries, which a faster back end can replace one by one:

    measure         logits -> loss, and the few numbers per token that the gradient needs; holds every collective
    write_gradient  logits and those numbers -> d loss / d logits; local, so that a backward pass never communicates
    differentiate_  both at once, the gradient into the student's storage; saves work between them

All arithmetic is in float32 (float64 for float64 student logits).

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks, P = details.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.losses.softmax import GatheredRows, Group, row_blocks, row_pieces

Rounds = Generator[Tensor, Tensor, tuple[Tensor, Tensor]]
"""Yields what this rank contributes to a collective [T, K], is sent all ranks' [R, T, K], returns (loss_T, stats_TK).

Several of them can run side by side and share their collectives (``combine.Sum``).
"""


class Joined(tuple[Any, ...]):
    """Several targets of the same rows; a slice of rows is taken of each."""

    __slots__ = ()

    def rows(self, rows: slice) -> "Joined":
        """The targets of some rows."""
        return Joined(rows_of(part, rows) for part in self)


def rows_of(target: Any, rows: slice) -> Any:
    """Some rows of a target, be it one tensor or several."""
    return target.rows(rows) if isinstance(target, Joined) else target[rows]


@dataclass(frozen=True)
class Comparison(ABC):
    """How a student's logits [T, V] are compared with a target.

    Attributes:
        group: Ranks that the vocabulary is split over, or ``None``.
    """

    group: Group

    @abstractmethod
    def rounds(self, student_TV: Tensor, target: Any, /) -> Rounds:
        """The collectives of ``measure``, one ``yield`` each; the logits are not modified."""

    def gradient(self, student_TV: Tensor, target: Any, stats_TK: Tensor, upstream_T: Tensor, /) -> Tensor:
        """[T, V] upstream * d loss / d logits of the student, in the dtype of the stats. Allocates a few [T, V].

        A subclass has its own version of this, for pieces of rows, or of ``write_gradient``.
        """
        grad_TV = torch.empty_like(student_TV, dtype=stats_TK.dtype)
        self.write_gradient(student_TV, target, stats_TK, upstream_T, grad_TV)
        return grad_TV

    def write_gradient(
        self, student_TV: Tensor, target: Any, stats_TK: Tensor, upstream_T: Tensor, out_TV: Tensor, /
    ) -> None:
        """``gradient`` into ``out_TV`` of any float dtype, which may be the storage of ``student_TV``."""
        for rows in row_pieces(student_TV):
            out_TV[rows] = self.gradient(
                student_TV[rows], rows_of(target, rows), stats_TK[rows], upstream_T[rows]
            )

    @abstractmethod
    def num_stats(self, target: Any, /) -> int:
        """K of the numbers that ``measure`` returns for ``write_gradient``."""

    @property
    def detail_names(self) -> tuple[str, ...]:
        """What the columns of ``details`` are, for metrics."""
        return ()

    def details(self, stats_TK: Tensor, target: Any, /) -> Tensor:
        """[T, P] numbers about each token beside its loss."""
        return stats_TK[:, :0]

    def measure(self, student_TV: Tensor, target: Any, /) -> tuple[Tensor, Tensor]:
        """(loss_T in nats, stats_TK for ``write_gradient``), equal on all ranks; the logits are not modified."""
        return communicate(self.rounds(student_TV, target), self.group)

    def differentiate_(self, student_TV: Tensor, target: Any, upstream_T: Tensor, /) -> tuple[Tensor, Tensor]:
        """As ``measure``; ``student_TV`` is overwritten with its gradient, in its dtype, a teacher's with scratch."""
        runs = (
            self.differentiate_rounds_(student_TV[block], rows_of(target, block), upstream_T[block])
            for block in row_blocks(student_TV, self.group)
        )
        return joined_rows([communicate(run, self.group) for run in runs])

    def differentiate_rounds_(self, student_TV: Tensor, target: Any, upstream_T: Tensor, /) -> Rounds:
        """The collectives of ``differentiate_`` for rows that share them; the gradient is there when they are over."""
        loss_T, stats_TK = yield from self.rounds(student_TV, target)
        self.write_gradient(student_TV, target, stats_TK, upstream_T, student_TV)
        return loss_T, stats_TK


def communicate(rounds: Rounds, group: Group) -> tuple[Tensor, Tensor]:
    """Run ``rounds`` with one all-gather for each."""
    return InFlight(rounds, group).finish()


class InFlight:
    """Rounds of which one collective is on its way while the caller computes something else.

    Args:
        rounds: Run up to their first collective.
        group: Its ranks, of which all start and finish the same runs in the same order.

    Attributes:
        num_started: Collectives that were started so far.
    """

    def __init__(self, rounds: Rounds, group: Group):
        self._rounds, self._group = rounds, group
        self._result: tuple[Tensor, Tensor] | None = None
        self._gathering: GatheredRows | None = None
        self.num_started = 0
        self._go_on(None)

    def advance(self) -> None:
        """Wait for the collective on its way and start the next one, of which there must be one."""
        assert self._gathering is not None
        self._go_on(self._gathering.wait())

    def finish(self) -> tuple[Tensor, Tensor]:
        """What the rounds return."""
        while self._gathering is not None:
            self._go_on(self._gathering.wait())
        assert self._result is not None  # nothing is on its way only after the last round
        return self._result

    def _go_on(self, packed_RTK: Tensor | None) -> None:
        try:
            local_TK = next(self._rounds) if packed_RTK is None else self._rounds.send(packed_RTK)
        except StopIteration as done:
            self._gathering, self._result = None, done.value
            return
        self._gathering = GatheredRows(local_TK, self._group)
        self.num_started += 1


def side_by_side(runs: Sequence[Rounds]) -> Generator[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Run several rounds with common collectives; what each of them returned."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    waiting = {i: next(run) for i, run in enumerate(runs)}
    while waiting:
        packed_RTK = yield torch.cat(list(waiting.values()), -1)
        parts = packed_RTK.split([local_TK.shape[-1] for local_TK in waiting.values()], -1)
        for i, part_RTK in zip(list(waiting), parts, strict=True):
            try:
                waiting[i] = runs[i].send(part_RTK)
            except StopIteration as done:
                results[i] = done.value
                del waiting[i]
    return [results[i] for i in range(len(runs))]


def joined_rows(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(loss_T, stats_TK) of at least one block after the other."""
    if len(parts) == 1:
        return parts[0]
    losses, stats = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(stats)
