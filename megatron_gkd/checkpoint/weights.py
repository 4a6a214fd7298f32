"""Loading of weights from Hugging Face folders and Megatron checkpoints, into any layout.

A Hugging Face folder is read slice by slice. A Megatron checkpoint is resharded by dist_checkpointing.

Shapes: V = vocabulary entries of this rank, H = hidden size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_gkd.checkpoint.integrity import CheckpointError, find_damage_on_any_rank, read_manifest
from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.config.model import ModelConfig
from megatron_gkd.models.gpt import LocalModel, chunks_of, padded_vocab_size
from megatron_gkd.models.lora import LoraSpec, attach_adapters, merge_adapters
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.reshard.layout import WeightLayout, rank_slices
from megatron_gkd.reshard.transport import HfFolder, read_slices

WEIGHTS = "weights"
HF_FILES = "hf"
LORA = "lora"  # key of the adapters' settings in the manifest


@dataclass(frozen=True)
class WeightSource:
    """A folder of weights.

    Attributes:
        folder: A Hugging Face folder or a Megatron checkpoint.
        is_checkpoint: True for a Megatron checkpoint.
    """

    folder: Path
    is_checkpoint: bool

    @classmethod
    def of(cls, section: ModelConfig) -> "WeightSource":
        """The weights that a model section names."""
        if section.checkpoint is not None:
            return cls(section.checkpoint, is_checkpoint=True)
        assert section.hf is not None  # the schema asks for exactly one of the two
        return cls(section.hf, is_checkpoint=False)

    @property
    def hf_folder(self) -> Path:
        """Folder with config.json and the tokenizer files."""
        return self.folder / HF_FILES if self.is_checkpoint else self.folder


def load_weights(
    model: LocalModel,
    source: WeightSource,
    shapes: HfShapes,
    groups: ModelGroups,
    *,
    vocab_divisible_by: int = 1,
    is_headless: bool = False,
    merges_adapters: bool = True,
    device: torch.device,
) -> None:
    """Load every parameter of this rank. Collective over all ranks.

    Args:
        model: The model to fill.
        source: Folder of the weights.
        shapes: Shapes of the model.
        groups: Its layout and process groups.
        vocab_divisible_by: Padding of the vocabulary, as in ``build_gpt``.
        is_headless: The model has no output projection.
        merges_adapters: Merge a checkpoint's adapters into the weights; False attaches them to the model.
        device: The device of this rank.

    Raises:
        CheckpointError: The checkpoint is damaged or belongs to another model.
        ValueError: The Hugging Face folder lacks a tensor.
    """
    if source.is_checkpoint:
        _load_checkpoint(model, source.folder, groups, device, is_headless, merges_adapters)
        return
    padded = padded_vocab_size(
        shapes.vocab_size, divisible_by=vocab_divisible_by, tp_size=groups.layout.tp_size
    )
    parameters = dict(model.named_parameters())
    slices = rank_slices(
        WeightLayout(shapes, groups.layout, padded),
        tp_rank=groups.tp_rank,
        pp_rank=groups.pp_rank,
        parameters=parameters,
        is_headless=is_headless,
    )
    read_slices(parameters, HfFolder(source.folder), slices)


def load_head(
    source: WeightSource,
    shapes: HfShapes,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
    dp_rank: int,
    dtype: torch.dtype,
    device: torch.device,
    is_needed: bool,
) -> Tensor | None:
    """Load a [V, H] shard of the LM head for any vocabulary split. Collective.

    Args:
        source: Folder of the weights.
        shapes: Shapes of the model.
        tp_rank: Index of the shard.
        tp_size: Number of shards.
        padded_vocab: Rows over all shards; rows beyond the vocabulary are zero.
        dp_rank: Data-parallel rank in the layout of the split; replicas load the same shard.
        dtype: Data type of the result.
        device: Device of the result.
        is_needed: False: this rank takes part in the collective and returns ``None``.
    """
    rows = padded_vocab // tp_size
    head_VH = torch.zeros(rows, shapes.hidden_size, dtype=dtype)
    if source.is_checkpoint:
        key = "embedding.word_embeddings.weight" if shapes.tied else "output_layer.weight"
        wanted = {}
        if is_needed:
            wanted["head"] = ShardedTensor.from_rank_offsets(
                key, head_VH, (0, tp_rank, tp_size), replica_id=(0, 0, dp_rank), allow_shape_mismatch=True
            )
        # Access validation requires that all ranks together load every shard exactly once, which loading the head of one
        # model on the ranks of another need not do.
        dist_checkpointing.load(wanted, str(source.folder / WEIGHTS), validate_access_integrity=False)
    elif is_needed:
        start, stop = tp_rank * rows, min((tp_rank + 1) * rows, shapes.vocab_size)
        if start < stop:  # the last shards may consist of padding
            name = "model.embed_tokens.weight" if shapes.tied else "lm_head.weight"
            head_VH[: stop - start] = HfFolder(source.folder).read(
                name, ((start, stop), (0, shapes.hidden_size))
            )
    return head_VH.to(device) if is_needed else None


def _load_checkpoint(
    model: LocalModel,
    folder: Path,
    groups: ModelGroups,
    device: torch.device,
    is_headless: bool,
    merges_adapters: bool,
) -> None:
    require_intact(folder, device)
    if adapters := read_manifest(folder).get(LORA):
        attach_adapters(model, LoraSpec.from_json(adapters), groups)
    metadata = {"dp_cp_group": groups.pg.dp_cp}
    if is_headless:
        # GPTModel.sharded_state_dict requires an output layer's weight; its base class takes the modules as they are.
        wanted = MegatronModule.sharded_state_dict(chunks_of(model)[0], metadata=metadata)
    else:
        wanted = model.sharded_state_dict(metadata=metadata)
    state: Any = dist_checkpointing.load(wanted, str(folder / WEIGHTS))
    # The common state of a training checkpoint (optimizer settings) is returned too; dist_checkpointing always loads it.
    fill_model(model, {name: value for name, value in state.items() if name in wanted}, folder)
    if adapters and merges_adapters:
        merge_adapters(model)


def require_intact(folder: Path, device: torch.device) -> None:
    """Verify a checkpoint's files against its manifest. Collective.

    Raises:
        CheckpointError: They do not match; raised on all ranks.
    """
    # Before anything is opened: dist_checkpointing's .metadata is a pickle.
    if damage := find_damage_on_any_rank(folder, device=device):
        raise CheckpointError(f"{folder} cannot be loaded: {damage}")


def fill_model(model: LocalModel, weights: dict[str, Any], folder: Path) -> None:
    """Copy a state dict loaded from ``folder`` into the model.

    Raises:
        CheckpointError: Parameters are missing or unexpected.
    """
    result = model.load_state_dict(weights, strict=False)
    # _extra_state: Transformer Engine's FP8 metadata, absent in checkpoints of other back ends
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {missing}, unexpected {result.unexpected_keys}"
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the data type of a checkpoint's weights, from its manifest."""
    return getattr(torch, read_manifest(folder)["dtype"])
