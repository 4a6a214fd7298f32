"""Statistics of a softmax over a vocabulary that is split across tensor-parallel ranks.

Shapes: T = tokens, V = vocabulary entries held by this rank, K = numbers per token on the wire, R = ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# renamed in torch 2.13
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor

_ELEMENTS_PER_PIECE = 1 << 18
"""Entries of one elementwise pass on CPU: a float32 temporary of 1 MiB stays in the second-level cache."""
_ELEMENTS_PER_ACCELERATOR_PIECE = 1 << 26
"""Of one on an accelerator: a float32 temporary takes 256 MiB, and a pass is long beside the launch of a kernel."""
_MIN_ROWS_PER_BLOCK = 8
"""A fused pass is not made for single rows."""


class Temperatures(NamedTuple):
    """What the two models' logits are divided by."""

    student: float
    teacher: float


class SoftmaxStats(NamedTuple):
    """Normalizer of softmax(logits / temperature): a logsumexp instead would round at |logsumexp| * 2**-24."""

    max_T: Tensor  # of the logits, not divided: dividing first would round away what the subtraction keeps
    sumexp_T: Tensor  # sum over v of exp((logit_v - max) / temperature)

    @classmethod
    def merged(cls, max_RT: Tensor, sumexp_RT: Tensor, temperature: float = 1.0) -> "SoftmaxStats":
        """Statistics of the whole vocabulary from those of its parts."""
        max_T = max_RT.amax(0)
        return cls(max_T, (sumexp_RT * ((max_RT - max_T) / temperature).exp()).sum(0))


def local_max(logits_TV: Tensor) -> Tensor:
    """[T] max over the shard.

    The max of a row without a finite entry, or without any column, is the lowest finite number: exp of its distance to
    any real max is 0, and no NaN appears.
    """
    lowest = torch.finfo(logits_TV.dtype).min
    if logits_TV.shape[-1] == 0:
        return logits_TV.new_full(logits_TV.shape[:-1], lowest)
    return logits_TV.amax(-1).clamp_min_(lowest)


def shifted(logits_TV: Tensor, max_T1: Tensor, temperature: float = 1.0) -> Tensor:
    """A new tensor (logits - max) / temperature, in the dtype of ``max_T1``."""
    shifted_TV = logits_TV.to(max_T1.dtype) - max_T1
    return shifted_TV if temperature == 1.0 else shifted_TV.div_(temperature)


class GatheredRows:
    """An all-gather on its way: [R, T, K] of all ranks; R = 1 without a group, and no collective for zero rows."""

    def __init__(self, local_TK: Tensor, group: Group):
        num_tokens, num_numbers = local_TK.shape
        self._work = None
        if group is None:
            self._out_RTK = local_TK.unsqueeze(0)
            return
        self._local_TK = local_TK.contiguous()  # stays until the collective has read it
        self._out_RTK = local_TK.new_empty(group.size(), num_tokens, num_numbers)
        if num_tokens > 0:
            out = self._out_RTK.view(-1, num_numbers)
            self._work = _all_gather(out, self._local_TK, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The rows, on a GPU for what is queued after this call."""
        if self._work is not None:
            self._work.wait()
        return self._out_RTK


def split_over(group: Group) -> Group:
    """``group``, or ``None`` if it has a single rank."""
    return None if group is None or group.size() == 1 else group


def first_id(num_columns: int, group: Group) -> int:
    """Vocabulary id of this rank's first column; shards are of equal size."""
    return 0 if group is None else group.rank() * num_columns


def num_real_columns(num_columns: int, group: Group, valid_vocab_size: int | None) -> int:
    """Leading columns of this rank's shard that are real vocabulary entries; 0 if it holds padding only.

    Raises:
        ValueError: If ``valid_vocab_size`` is not between 1 and the size of all shards together.
    """
    if valid_vocab_size is None:
        return num_columns
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    if not 1 <= valid_vocab_size <= num_columns * num_ranks:
        raise ValueError(
            f"valid_vocab_size {valid_vocab_size} is not in [1, {num_columns * num_ranks}] = {num_ranks} shards of "
            f"{num_columns} columns; pass the vocabulary size before padding"
        )
    return min(max(valid_vocab_size - rank * num_columns, 0), num_columns)


def row_pieces(logits_TV: Tensor, rows_per_piece: int | None = None) -> Iterator[slice]:
    """Slices of rows for elementwise passes; by default cache-sized on a CPU, and few and large on an accelerator."""
    num_rows, num_columns = logits_TV.shape
    if rows_per_piece is None:
        is_cached = logits_TV.device.type == "cpu"
        num_elements = _ELEMENTS_PER_PIECE if is_cached else _ELEMENTS_PER_ACCELERATOR_PIECE
        rows_per_piece = max(1, num_elements // max(num_columns, 1))
    return row_slices(num_rows, rows_per_piece)


def row_blocks(logits_TV: Tensor, group: Group) -> Iterator[slice]:
    """Slices of rows that go through all passes of a loss together: all rows (also where there is none) if they share
    collectives, else as many as stay in the last-level cache of a CPU."""
    num_rows, num_columns = logits_TV.shape
    if group is not None or num_rows == 0 or logits_TV.device.type != "cpu":
        return iter([slice(0, num_rows)])
    return row_slices(num_rows, max(_MIN_ROWS_PER_BLOCK, 4 * _ELEMENTS_PER_PIECE // max(num_columns, 1)))


def row_slices(num_rows: int, rows_per_slice: int) -> Iterator[slice]:
    """Slices that cover ``num_rows`` rows, all but the last of ``rows_per_slice``."""
    return (
        slice(start, min(start + rows_per_slice, num_rows)) for start in range(0, num_rows, rows_per_slice)
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every float type; float64 stays, so that gradcheck works."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def numbers_per_row(logits_TV: Tensor, count: int) -> Tensor:
    """Uninitialized [T, count] of the accumulation dtype."""
    return logits_TV.new_empty(logits_TV.shape[0], count, dtype=accumulation_dtype(logits_TV.dtype))
