"""A save that goes on while training does: child processes write, a thread hashes, all ranks publish together."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_gkd.checkpoint.integrity import FileFacts, describe_share
from megatron_gkd.parallel.collectives import any_rank


class BackgroundSave:
    """Tensors as they are now, on their way to the disk.

    A process forked from each rank writes its shards: it holds the values of the moment of the fork (a copy on the host
    of those on a GPU), whatever training does to them afterwards.

    Args:
        request: What ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
        folder: Folder that is being written.
        publish: Called once on every rank, with its share of the files' hashes, when all has been written. Collective.
        device: The device of this rank.
    """

    def __init__(
        self,
        request: AsyncRequest,
        folder: Path,
        publish: Callable[[FileFacts], None],
        *,
        device: torch.device,
    ):
        self._folder, self._publish, self._device = folder, publish, device
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash")
        self._hashes: Future[FileFacts] | None = None
        self._calls: Any = AsyncCallsQueue()
        self._calls.schedule_async_request(request)

    def advance(self, *, wait: bool) -> bool:
        """Go on as far as possible, or with ``wait`` to the end; whether the checkpoint is there. Collective.

        Raises:
            CheckpointException: A rank could not write its shards; on all ranks.
        """
        if self._hashes is None:
            if not self._calls.maybe_finalize_async_calls(blocking=wait):
                return False
            dist.barrier()
            rank, world = dist.get_rank(), dist.get_world_size()
            self._hashes = self._hasher.submit(describe_share, self._folder, rank, world)
        if not wait and any_rank(not self._hashes.done(), device=self._device):
            return False
        self._publish(self._hashes.result())
        self._hasher.shutdown()
        return True
