"""Send hidden states from the teacher's last pipeline stage to the student's.

Each model splits the global batch into consecutive, equal shares, one per data-parallel rank; the two data-parallel sizes
may differ. The rows of a sequence are its completion positions; all ranks know the number of rows of every sequence.

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
    """A transfer of the rows of consecutive sequences; source and destination may be equal.

    Attributes:
        src: Global rank of the source.
        dst: Global rank of the destination.
        start: Index of the first sequence in the global batch.
        stop: End of the range, exclusive.
    """

    src: int
    dst: int
    start: int
    stop: int


def share(num_sequences: int, copy: int, num_copies: int) -> tuple[int, int]:
    """Range [start, stop) of the sequences of data-parallel rank ``copy`` out of ``num_copies``."""
    size = num_sequences // num_copies
    return copy * size, (copy + 1) * size


def plan_transfers(teacher: Layout, student: Layout, num_sequences: int) -> list[Transfer]:
    """Plan all transfers between the last stages, ordered by destination and sequence.

    All tensor-parallel ranks of a teacher replica hold the same rows. A student rank copies them locally if it is one of
    these ranks; otherwise the student's tensor-parallel ranks are spread over the teacher's.
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
    """Execute a plan. Collective over all ranks.

    Args:
        transfers: The complete plan, the same on all ranks.
        rows_TH: [T, H] rows of this rank's share, sequence by sequence; ``None`` if it is no source.
        first_sequence: First sequence of this rank's share.
        lengths: Number of rows of each sequence in the global batch.
        hidden_size: H.
        dtype: dtype of the rows.
        device: Device of the received rows.

    Returns:
        [T, H] rows of this rank's sequences in order; ``None`` if it is no destination.
    """
    rank = dist.get_rank()
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    operations, arriving = [], []
    for transfer in transfers:
        num_rows = offsets[transfer.stop] - offsets[transfer.start]
        if transfer.src == rank:
            assert rows_TH is not None  # plan_transfers takes sources from the teacher's last stage
            base = offsets[transfer.start] - offsets[first_sequence]
            outgoing_TH = rows_TH[base : base + num_rows].contiguous()
            if transfer.dst == rank:
                arriving.append(outgoing_TH)
            elif num_rows:  # both ends skip empty transfers, so sends and receives still match
                operations.append(dist.P2POp(dist.isend, outgoing_TH, transfer.dst))
        elif transfer.dst == rank:
            arriving.append(torch.empty(num_rows, hidden_size, dtype=dtype, device=device))
            if num_rows:
                operations.append(dist.P2POp(dist.irecv, arriving[-1], transfer.src))
    if operations:
        # one batch, because the plan may contain cycles: separate blocking sends would deadlock
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return torch.cat(arriving) if arriving else None
