"""Shards of a tensor on the ranks of a test, and what they are together."""

import torch
import torch.distributed as dist


def group_of(world_size):
    return dist.group.WORLD if world_size > 1 else None


def padded_shard(x, dim, rank, world_size, multiple_of=1, fill=7.0):
    """This rank's equal part of ``x``, after padding ``dim`` to a multiple of ``multiple_of`` * world_size."""
    missing = -x.shape[dim] % (multiple_of * world_size)
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, fill)], dim).chunk(world_size, dim)[rank]


def assert_equal_on_all_ranks(x, group):
    if group is not None:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.detach().contiguous(), group=group)
        assert all(part.equal(parts[0]) for part in parts)


def ones(tokens):
    return torch.ones(tokens).double()


def summed(x, group):
    x = x.clone()
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
