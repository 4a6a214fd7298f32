"""Is there room for a checkpoint? Asked before the first byte is written, so that a full disk costs nothing."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_gkd.checkpoint.integrity import CheckpointError
from megatron_gkd.parallel.collectives import reduce_values

_SMALL_FILES = 64 * 2**20  # tokenizer, metadata, manifest
_GIB = 2**30


class NoSpaceError(CheckpointError):
    """The disk has no room for a checkpoint; nothing was written and no older checkpoint was touched."""


def require_space(folder: Path, sharded: dict[str, Any], *, device: torch.device) -> None:
    """Check that the disk of ``folder`` has room for what all ranks together are about to write. Collective.

    Args:
        folder: Existing folder on the disk in question.
        sharded: What dist_checkpointing will save.
        device: Where the collective back end wants its tensors.

    Raises:
        NoSpaceError: It has not; on all ranks.
    """
    free = shutil.disk_usage(folder).free if dist.get_rank() == 0 else 0
    total, free = reduce_values([_own_bytes(sharded), free], ["sum", "rank0"], device=device)
    needed = total + _SMALL_FILES
    if needed > free:
        raise NoSpaceError(
            f"a checkpoint takes {needed / _GIB:.2f} GiB, but the disk of {folder} (under train.output_dir) has "
            f"{free / _GIB:.2f} GiB left; free some space or lower checkpoint.keep_last. "
            "The checkpoints that exist are untouched"
        )


def _own_bytes(sharded: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes, not counting those that another rank writes for it."""
    return sum(
        leaf.data.numel() * leaf.data.element_size()
        for leaf in nested_values(sharded)
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory)
        and leaf.data is not None
        and is_main_replica(leaf.replica_id)
    )
