"""All-gathers of some numbers for each token.

A computation yields what it contributes to a collective (``Rounds``), so that several of them share one all-gather, and
one all-gather overlaps other work.

Shapes: T = tokens, K = numbers per token on the wire, R = ranks.
"""

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# renamed in torch 2.13
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def split_over(group: Group) -> Group:
    """``group``, or ``None`` if it has a single rank."""
    return None if group is None or group.size() == 1 else group


class GatheredRows:
    """An all-gather in flight: [R, T, K] of all ranks; no collective for zero rows."""

    def __init__(self, local_TK: Tensor, group: dist.ProcessGroup):
        num_tokens, num_numbers = local_TK.shape
        self._work = None
        self._local_TK = local_TK.contiguous()  # must live until the collective has read it
        self._out_RTK = local_TK.new_empty(group.size(), num_tokens, num_numbers)
        if num_tokens > 0:
            out = self._out_RTK.view(-1, num_numbers)
            self._work = _all_gather(out, self._local_TK, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The rows; on a GPU, for kernels that are queued after this call."""
        if self._work is not None:
            self._work.wait()
        return self._out_RTK


Rounds = Generator[Tensor, Tensor, tuple[Tensor, Any]]
"""Yields this rank's contribution to a collective [T, K], is sent all ranks' [R, T, K], returns (loss_T, saved)."""


class InFlight:
    """Rounds of which one collective is in flight while the caller computes something else.

    Args:
        rounds: Advanced to their first collective.
        group: Its ranks, which all start and finish the same rounds in the same order.

    Attributes:
        num_started: Collectives started so far.
    """

    def __init__(self, rounds: Rounds, group: dist.ProcessGroup):
        self._rounds, self._group = rounds, group
        self._result: tuple[Tensor, Any] | None = None
        self._gathering: GatheredRows | None = None
        self.num_started = 0
        self._continue(None)

    def advance(self) -> None:
        """Wait for the collective in flight, which must exist, and start the next one."""
        assert self._gathering is not None
        self._continue(self._gathering.wait())

    def finish(self) -> tuple[Tensor, Any]:
        """(loss_T, saved) of the rounds."""
        while self._gathering is not None:
            self._continue(self._gathering.wait())
        assert self._result is not None  # nothing is in flight only after the last round
        return self._result

    def _continue(self, packed_RTK: Tensor | None) -> None:
        try:
            local_TK = next(self._rounds) if packed_RTK is None else self._rounds.send(packed_RTK)
        except StopIteration as done:
            self._gathering, self._result = None, done.value
            return
        self._gathering = GatheredRows(local_TK, self._group)
        self.num_started += 1


def run_rounds(rounds: Rounds, group: Group) -> tuple[Tensor, Any]:
    """Run the rounds to their end, one collective after the other; without a group there is none."""
    if group is not None:
        return InFlight(rounds, group).finish()
    local_TK = next(rounds)
    while True:
        try:
            local_TK = rounds.send(local_TK.unsqueeze(0))
        except StopIteration as done:
            return done.value


def side_by_side(runs: Sequence[Rounds]) -> Generator[Tensor, Tensor, list[tuple[Tensor, Any]]]:
    """Run several rounds with shared collectives; returns the result of each."""
    results: dict[int, tuple[Tensor, Any]] = {}
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
