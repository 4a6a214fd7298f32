"""Building blocks of losses over a vocabulary that is split across tensor-parallel ranks.

Softmax statistics, elementwise functions, and pieces of rows.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.parallel.gathering import Group

_ELEMENTS_PER_PIECE = 1 << 17
"""Entries of one elementwise pass on a CPU: some float32 temporaries of 512 KiB stay in the second-level cache."""
_ELEMENTS_PER_ACCELERATOR_PIECE = 1 << 26
"""Entries of one pass on an accelerator: a float32 temporary takes 256 MiB, and the launch costs nothing beside it."""
_MIN_ROWS_PER_BLOCK = 8
"""Rows of a block on a CPU: the compiled passes need more than single rows."""
_LOG2_E = math.log2(math.e)


class Temperatures(NamedTuple):
    """Divisors of the logits of both models."""

    student: float
    teacher: float


class SoftmaxStats(NamedTuple):
    """Normalizer of softmax(logits / temperature): a logsumexp instead would round at |logsumexp| * 2**-24."""

    max_T: Tensor  # of the logits, not divided: dividing first would round away what the subtraction keeps
    sumexp_T: Tensor  # sum over v of exp((logit_v - max) / temperature)

    @classmethod
    def merged(cls, max_RT: Tensor, sumexp_RT: Tensor, temperature: float = 1.0) -> "SoftmaxStats":
        """Statistics of the whole vocabulary from those of its shards."""
        max_T = max_RT.amax(0)
        return cls(max_T, (sumexp_RT * ((max_RT - max_T) / temperature).exp()).sum(0))


def local_max(logits_TV: Tensor) -> Tensor:
    """[T] max over the shard.

    A row without a finite entry, or without any column, has the lowest finite number as its max: exp of its distance to
    any real max is 0, and no NaN appears.
    """
    lowest = torch.finfo(logits_TV.dtype).min
    if logits_TV.shape[-1] == 0:
        return logits_TV.new_full(logits_TV.shape[:-1], lowest)
    return logits_TV.amax(-1).clamp_min_(lowest)


def shifted(logits_TV: Tensor, max_T1: Tensor, temperature: float = 1.0) -> Tensor:
    """New tensor (logits - max) / temperature, in the dtype of ``max_T1``."""
    shifted_TV = logits_TV.to(max_T1.dtype) - max_T1
    return shifted_TV if temperature == 1.0 else shifted_TV.div_(temperature)


def exp(x: Tensor) -> Tensor:
    """e^x, by the vectorized exp2: less than half the time of ``torch.exp``, which calls MKL (seen on an AMD EPYC).

    The relative error is |x| * 2**-24. In a softmax that is negligible: x is the distance to the max, and an entry far
    below the max has no weight. e^0 is exactly 1.
    """
    return (x * _LOG2_E).exp2_()


def exp_(x: Tensor) -> Tensor:
    """``exp`` in place."""
    return x.mul_(_LOG2_E).exp2_()


def expm1(x: Tensor) -> Tensor:
    """e^x - 1 with its relative accuracy near 0, also where torch.compile would compute exp(x) - 1 (torch 2.13)."""
    if not torch.compiler.is_compiling():
        return torch.expm1(x)
    series = x * (1 / 40320) + 1 / 5040
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5):
        series = series * x + coefficient
    return torch.where(x.abs() <= 0.5, series * x * x + x, exp(x) - 1)


def times_(factor: Tensor, probability: Tensor) -> Tensor:
    """Product in the storage of factor, with 0 log 0 = 0: where factor is infinite (or the NaN of inf - inf) and probability is 0.

    TRAP: entries of a NaN row become 0 as well, because ``where(probability == 0, ...)`` costs more than two ``exp`` on
    a CPU; compiled, it costs nothing and keeps them. A NaN logit makes its row's normalizer NaN: whoever sums these
    entries adds ``nan_if_not_positive`` of the normalizer.
    """
    if torch.compiler.is_compiling():
        return torch.where(probability == 0, 0.0, probability * factor)
    return factor.mul_(probability).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def mixed_(x: Tensor, other: Tensor, is_other: Tensor) -> Tensor:
    """``other`` where ``is_other`` is 1, ``x`` where it is 0; both are finite, and the storage of x is used."""
    if torch.compiler.is_compiling():
        return torch.where(is_other == 1, other, x)
    return x.mul_(1 - is_other).addcmul_(
        other, is_other
    )  # a tenth of the time of where on a CPU (torch 2.13)


def nan_if_not_positive(*sums: Tensor) -> Tensor:
    """0, but NaN where one of the sums is NaN, infinite, 0 or negative: a row with NaN or inf, or only -inf."""
    return sum((0.0 * x.log() for x in sums[1:]), 0.0 * sums[0].log())


def row_sum(x_TV: Tensor) -> Tensor:
    """[T] sums over the last dimension, with small rounding errors also for long rows.

    ``torch.sum`` adds in a tree; a compiled loop adds one by one and so needs the digits of float64.
    """
    if torch.compiler.is_compiling():
        return x_TV.sum(-1, dtype=torch.float64).to(x_TV.dtype)
    return x_TV.sum(-1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every float type; float64 stays, so that gradcheck works."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def numbers_per_row(logits_TV: Tensor, count: int) -> Tensor:
    """Uninitialized [T, count] of the accumulation dtype."""
    return logits_TV.new_empty(logits_TV.shape[0], count, dtype=accumulation_dtype(logits_TV.dtype))


def row_slices(num_rows: int, rows_per_slice: int) -> Iterator[slice]:
    """Slices that cover ``num_rows`` rows, all but the last of ``rows_per_slice``."""
    starts = range(0, num_rows, rows_per_slice)
    return (slice(start, min(start + rows_per_slice, num_rows)) for start in starts)


def row_pieces(logits_TV: Tensor, rows_per_piece: int | None = None) -> Iterator[slice]:
    """Slices of rows for elementwise passes; by default cache-sized on a CPU, and few and large on an accelerator."""
    num_rows, num_columns = logits_TV.shape
    if rows_per_piece is None:
        is_cached = logits_TV.device.type == "cpu"
        num_elements = _ELEMENTS_PER_PIECE if is_cached else _ELEMENTS_PER_ACCELERATOR_PIECE
        rows_per_piece = max(1, num_elements // max(num_columns, 1))
    return row_slices(num_rows, rows_per_piece)


def row_blocks(logits_TV: Tensor, group: Group) -> Iterator[slice]:
    """Slices of rows that go through all passes of a loss together.

    All rows (also if there is none) where they share collectives or run on an accelerator; else as many as stay in the
    last-level cache of a CPU.
    """
    num_rows, num_columns = logits_TV.shape
    if group is not None or num_rows == 0 or logits_TV.device.type != "cpu":
        return iter([slice(0, num_rows)])
    return row_slices(num_rows, max(_MIN_ROWS_PER_BLOCK, 8 * _ELEMENTS_PER_PIECE // max(num_columns, 1)))


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
