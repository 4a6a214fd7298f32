"""Free-space check before a save, and saves that overlap with training."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_gkd.checkpoint.integrity import CheckpointError, FileDigests, hash_share
from megatron_gkd.parallel.collectives import any_rank, reduce_values

_SMALL_FILES = 64 * 2**20  # tokenizer, metadata, manifest
_GIB = 2**30


class NoSpaceError(CheckpointError):
    """Not enough free disk space; nothing was written and older checkpoints are untouched."""


def require_space(folder: Path, sharded: dict[str, Any], *, device: torch.device) -> None:
    """Check that the disk has room for what all ranks are about to write. Collective.

    Args:
        folder: Existing folder on the disk in question.
        sharded: State dict to be saved by dist_checkpointing.
        device: Device of the collective's tensors.

    Raises:
        NoSpaceError: There is not enough room; raised on all ranks.
    """
    # Before the first byte: a writer that fails with ENOSPC ends the run, this error does not.
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
    """Return the bytes of the tensors that this rank writes."""
    return sum(
        leaf.data.numel() * leaf.data.element_size()
        for leaf in nested_values(sharded)
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory)
        and leaf.data is not None
        and is_main_replica(leaf.replica_id)  # replicas on other ranks are not written
    )


class BackgroundSave:
    """A save in flight: forked processes write, a thread hashes, all ranks publish together.

    Each rank forks a process that writes its shards. It holds the values at the time of the fork (a host copy of those on a
    GPU), so training may continue.

    Args:
        request: Returned by ``dist_checkpointing.save(..., async_sharded_save=True)``.
        folder: Folder that is being written.
        publish: Called on every rank with its share of the hashes when all files are written. Collective.
        device: The device of this rank.
    """

    def __init__(
        self,
        request: AsyncRequest,
        folder: Path,
        publish: Callable[[FileDigests], None],
        *,
        device: torch.device,
    ):
        self._folder, self._publish, self._device = folder, publish, device
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash")
        self._hashes: Future[FileDigests] | None = None
        self._calls: Any = AsyncCallsQueue()
        self._calls.schedule_async_request(request)

    def advance(self, *, wait: bool) -> bool:
        """Make progress, or finish if ``wait``; return whether the checkpoint is published. Collective.

        Raises:
            CheckpointException: A rank could not write its shards; raised on all ranks.
        """
        if self._hashes is None:
            if not self._calls.maybe_finalize_async_calls(blocking=wait):
                return False
            # Rank 0 writes the metadata last; no rank may list the folder before.
            dist.barrier()
            rank, world = dist.get_rank(), dist.get_world_size()
            # hashlib releases the GIL, so a thread is enough.
            self._hashes = self._hasher.submit(hash_share, self._folder, rank, world)
        # Agreed by all ranks, because publishing is collective.
        if not wait and any_rank(not self._hashes.done(), device=self._device):
            return False
        self._publish(self._hashes.result())
        self._hasher.shutdown()
        return True
