"""Reading of single weights from a Megatron checkpoint, one at a time.

dist_checkpointing stacks the layers of a model into one tensor, and a process must load its whole share at once. The files
are torch.distributed.checkpoint's, whose reader can load any block.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_gkd.checkpoint.integrity import CheckpointError
from megatron_gkd.models.gpt import LocalModel
from megatron_gkd.models.lora import merged_parameters
from megatron_gkd.parallel.groups import ModelGroups


class BlockReader:
    """Reads blocks of tensors, identified by Megatron's ``ShardedTensor``.

    Args:
        weights: Folder written by dist_checkpointing. Verify its manifest first: the metadata is a pickle.
    """

    def __init__(self, weights: Path):
        self._weights = weights
        self._reader = FileSystemReader(weights)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, wanted: ShardedTensor) -> Tensor:
        """Return the block described by ``wanted``, in its local shape; missing rows are zero.

        Raises:
            CheckpointError: The checkpoint has no such tensor.
        """
        stored: Any = self._metadata.state_dict_metadata.get(wanted.key)
        if stored is None:
            raise CheckpointError(f"{self._weights} has no tensor {wanted.key}; it is of another model")
        offsets = torch.Size(wanted.global_offset)
        sizes = (1,) * wanted.prepend_axis_num + tuple(wanted.local_shape)
        # The vocabulary is padded to a multiple of the TP size, so another layout may ask for more rows than were stored.
        available = [
            min(size, max(total - start, 0))
            for size, total, start in zip(sizes, stored.size, offsets, strict=True)
        ]
        block = torch.zeros(sizes, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets, torch.Size(available))
        items: Any = create_read_items_for_chunk_list(wanted.key, stored, [chunk])
        planner: Any = _BlockPlanner(block)
        self._reader.read_data(LoadPlan(items), planner).wait()
        return block.view(tuple(wanted.local_shape))


class _BlockPlanner:
    """The two methods of a ``LoadPlanner`` that ``FileSystemReader.read_data`` calls."""

    def __init__(self, block: Tensor):
        self._block = block

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        region = tuple(
            slice(start, start + size) for start, size in zip(item.dest_offsets, item.lengths, strict=True)
        )
        return self._block[region]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        pass  # ``tensor`` is a view of the block


def stream_weights(model: LocalModel, groups: ModelGroups, weights: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) with adapters merged, one weight in memory at a time.

    Args:
        model: An uninitialized model on one rank, with the checkpoint's adapters attached. Its weights are emptied.
        groups: Process groups of the model.
        weights: Folder written by dist_checkpointing, verified against its manifest.
    """
    reader = BlockReader(weights)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.pg.dp_cp})
    parameters, merged = dict(model.named_parameters()), merged_parameters(model)
    for name in parameters.keys() - merged.keys():  # adapters: loaded at once, because merging reads A and B
        parameters[name].data.copy_(_read_parameter(reader, sharded[name]))
    for name in merged:
        parameter = parameters[name]
        parameter.data = _read_parameter(reader, sharded[name]).to(parameter.device)
        yield name, merged[name].detach()
        parameter.data = parameter.new_empty(0)  # frees the weight before the next one is read


def _read_parameter(reader: BlockReader, entry: ShardedTensor | ShardedTensorFactory) -> Tensor:
    if isinstance(entry, ShardedTensor):
        return reader.read(entry)
    halves: Any = entry.build()  # linear_fc1: gate and up are stored as two tensors
    return torch.cat([reader.read(half) for half in halves])
