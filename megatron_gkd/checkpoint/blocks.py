"""Single blocks out of the tensors of a Megatron checkpoint; nothing else is read.

dist_checkpointing stacks the layers of a model into one tensor, of which a process must load its whole share at once. Below
it lies torch's distributed checkpoint, which can read any block.
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
    """Reads blocks of a checkpoint's tensors, by the keys of Megatron's ``ShardedTensor``.

    Args:
        weights: Folder that dist_checkpointing wrote; its metadata is a pickle, so it must be known to be whole.
    """

    def __init__(self, weights: Path):
        self._weights = weights
        self._reader = FileSystemReader(weights)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, wanted: ShardedTensor) -> Tensor:
        """The numbers that ``wanted`` stands for, in its local shape; vocabulary rows that were not stored are zero.

        Raises:
            CheckpointError: There is no such tensor.
        """
        stored: Any = self._metadata.state_dict_metadata.get(wanted.key)
        if stored is None:
            raise CheckpointError(f"{self._weights} has no tensor {wanted.key}; it is of another model")
        offsets = torch.Size(wanted.global_offset)
        sizes = (1,) * wanted.prepend_axis_num + tuple(wanted.local_shape)
        there = [
            min(size, max(total - start, 0))
            for size, total, start in zip(sizes, stored.size, offsets, strict=True)
        ]
        block = torch.zeros(sizes, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets, torch.Size(there))
        items: Any = create_read_items_for_chunk_list(wanted.key, stored, [chunk])
        into: Any = _Into(block)  # the reader asks for no more of a planner than this
        self._reader.read_data(LoadPlan(items), into).wait()
        return block.view(tuple(wanted.local_shape))


class _Into:
    """Tells torch's reader where in ``block`` a stored piece belongs."""

    def __init__(self, block: Tensor):
        self._block = block

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        place = tuple(
            slice(start, start + size) for start, size in zip(item.dest_offsets, item.lengths, strict=True)
        )
        return self._block[place]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        pass  # ``tensor`` is a view of the block


def stream_weights(model: LocalModel, groups: ModelGroups, weights: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, content) of each weight of a checkpoint, with what its adapter adds; one at a time is in memory.

    Args:
        model: A blank model of one rank, with the checkpoint's adapters attached; its weights are empty afterwards.
        groups: Its groups.
        weights: Folder that dist_checkpointing wrote, known to be whole.
    """
    reader = BlockReader(weights)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.pg.dp_cp})
    parameters, merged = dict(model.named_parameters()), merged_parameters(model)
    for name in parameters.keys() - merged.keys():  # adapters are small
        parameters[name].data.copy_(_read_parameter(reader, sharded[name]))
    for name in merged:
        parameter = parameters[name]
        parameter.data = _read_parameter(reader, sharded[name]).to(parameter.device)
        yield name, merged[name].detach()
        parameter.data = parameter.new_empty(0)


def _read_parameter(reader: BlockReader, entry: ShardedTensor | ShardedTensorFactory) -> Tensor:
    if isinstance(entry, ShardedTensor):
        return reader.read(entry)
    halves: Any = entry.build()  # gate and up, one after the other
    return torch.cat([reader.read(half) for half in halves])
