"""Which student ranks need the rows of which teacher rank, and their way there.

Both models cut the global batch into consecutive, equal shares, one per copy of the model; the number of copies may
differ. Rows are a sequence's completion positions, so every sequence has a length of its own that all ranks know.

Shapes: T = rows, H = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.parallel.groups import Layout


@dataclass(frozen=True)
class Transfer:
    """Rows of consecutive sequences from one rank to another (or to itself).

    Attributes:
        src: Global rank that has the rows.
        dst: Global rank that needs them.
        start: First sequence, index in the global batch.
        stop: Behind the last sequence.
    """

    src: int
    dst: int
    start: int
    stop: int


def share(num_sequences: int, copy: int, num_copies: int) -> tuple[int, int]:
    """[start, stop) of the sequences that one of ``num_copies`` copies of a model works on."""
    size = num_sequences // num_copies
    return copy * size, (copy + 1) * size


def plan_transfers(teacher: Layout, student: Layout, num_sequences: int) -> list[Transfer]:
    """Every transfer from the teacher's last stage to the student's, ordered by destination and sequence.

    Each student rank takes its rows from itself where it can; else tensor-parallel ranks of the student spread over
    those of the teacher, which all hold the same rows.
    """
    transfers = []
    for student_copy in range(student.dp_size):
        wanted = share(num_sequences, student_copy, student.dp_size)
        for tp_rank, dst in enumerate(student.last_stage_ranks(student_copy)):
            for teacher_copy in range(teacher.dp_size):
                held = share(num_sequences, teacher_copy, teacher.dp_size)
                start, stop = max(wanted[0], held[0]), min(wanted[1], held[1])
                if start < stop:
                    sources = teacher.last_stage_ranks(teacher_copy)
                    src = dst if dst in sources else sources[tp_rank % len(sources)]
                    transfers.append(Transfer(src, dst, start, stop))
    return transfers


def route_rows(
    transfers: Sequence[Transfer],
    rows_TH: Tensor | None,
    *,
    first_sequence: int,
    lengths: Sequence[int],
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Carry out a plan; collective over all ranks.

    Args:
        transfers: The whole plan, equal on all ranks.
        rows_TH: [T, H] rows of this rank's share, sequence by sequence; ``None`` if it has none to give.
        first_sequence: First sequence of this rank's share.
        lengths: Rows of each sequence of the global batch.
        hidden_size: H.
        dtype: Type of the rows.
        device: Where received rows go.

    Returns:
        [T, H] rows of the sequences that this rank needs, in order; ``None`` if it needs none.
    """
    rank = dist.get_rank()
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    operations, arriving = [], []
    for transfer in transfers:
        num_rows = offsets[transfer.stop] - offsets[transfer.start]
        if transfer.src == rank:
            assert rows_TH is not None  # the source of a transfer holds its rows
            base = offsets[transfer.start] - offsets[first_sequence]
            outgoing_TH = rows_TH[base : base + num_rows].contiguous()
            if transfer.dst == rank:
                arriving.append(outgoing_TH)
            elif num_rows:
                operations.append(dist.P2POp(dist.isend, outgoing_TH, transfer.dst))
        elif transfer.dst == rank:
            arriving.append(torch.empty(num_rows, hidden_size, dtype=dtype, device=device))
            if num_rows:
                operations.append(dist.P2POp(dist.irecv, arriving[-1], transfer.src))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return torch.cat(arriving) if arriving else None
