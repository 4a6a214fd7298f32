"""Small collectives of the training loop. Values travel as JSON or numbers, never as pickles."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def broadcast_json(
    value: Any, *, device: torch.device, src: int = 0, group: dist.ProcessGroup | None = None
) -> Any:
    """``value`` of rank ``src`` on every rank of ``group`` (default: all ranks).

    Args:
        value: Anything ``json`` can write; ignored on other ranks than ``src``.
        device: Where the collective back end wants its tensors.
        src: Global rank that owns the value.
        group: Process group.
    """
    is_owner = dist.get_rank() == src
    payload = json.dumps(value).encode() if is_owner else b""
    size = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    dist.broadcast(size, src, group=group)
    data = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    if is_owner:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, src, group=group)
    return value if is_owner else json.loads(bytes(data.cpu().numpy()))


def gather_json(value: Any, *, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = int(max(int(n.item()) for n in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(bytes(part[: int(n.item())].cpu().numpy())) for part, n in zip(parts, sizes, strict=True)
    ]


def reduce_values(
    values: Sequence[float],
    how: Sequence[str],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> list[float]:
    """Combine numbers across ranks with at most two collectives.

    Args:
        values: This rank's numbers; the same count in the same order on every rank.
        how: Per number ``"sum"``, ``"mean"``, ``"max"``, ``"min"`` or ``"rank0"`` (rank 0's number).
        device: Where the collective back end wants its tensors.
        group: Process group; default all ranks.

    Returns:
        The combined numbers in float64 precision, equal on all ranks.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    added, largest = [], []
    for value, kind in zip(values, how, strict=True):
        match kind:
            case "sum" | "mean":
                added.append(value)
            case "rank0":
                added.append(value if rank == 0 else 0.0)
            case "max":
                largest.append(value)
            case "min":
                largest.append(-value)
            case _:
                raise ValueError(f"unknown reduction {kind!r}; use sum, mean, max, min or rank0")
    sums = iter(_all_reduce(added, dist.ReduceOp.SUM, device, group))
    peaks = iter(_all_reduce(largest, dist.ReduceOp.MAX, device, group))
    finish = {
        "sum": lambda: next(sums),
        "rank0": lambda: next(sums),
        "mean": lambda: next(sums) / size,
        "max": lambda: next(peaks),
        "min": lambda: -next(peaks),
    }
    return [finish[kind]() for kind in how]


def any_rank(flag: bool, *, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether ``flag`` is true on at least one rank; the same answer everywhere."""
    return _all_reduce([float(flag)], dist.ReduceOp.MAX, device, group)[0] > 0


def _all_reduce(values: list[float], op: dist.ReduceOp.RedOpType, device: torch.device, group) -> list[float]:
    if not values:
        return []
    packed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(packed, op=op, group=group)
    return packed.tolist()
