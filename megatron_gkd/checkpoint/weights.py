"""Fill a model's parameters from whichever kind of folder the configuration names.

A Hugging Face folder is read slice by slice, straight into any layout. A folder of Megatron weights is read by
dist_checkpointing, which reshards as it loads.

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

from megatron_gkd.checkpoint.integrity import CheckpointError, check_everywhere, read_manifest
from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.models.gpt import LocalModel, chunks_of, padded_vocab_size
from megatron_gkd.models.lora import LoraSpec, attach_adapters, merge_adapters
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.reshard.layout import WeightLayout, rank_slices
from megatron_gkd.reshard.transport import HfFolder, read_slices

WEIGHTS = "weights"
HF_FILES = "hf"
LORA = "lora"
"""Key of the manifest that says which adapters the weights have."""


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from.

    Attributes:
        folder: A Hugging Face folder, or a checkpoint with a manifest.
        is_checkpoint: Which of the two.
    """

    folder: Path
    is_checkpoint: bool

    @property
    def hf_folder(self) -> Path:
        """Folder of config.json and the tokenizer files."""
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
    """Fill every parameter of this rank; collective over all ranks.

    The adapters of a checkpoint are added to the weights, or attached to the model with ``merges_adapters=False``.

    Raises:
        CheckpointError: A checkpoint is damaged or not of this model.
        ValueError: A Hugging Face folder lacks a tensor.
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
    """[V, H] shard of a model's output projection in a vocabulary split that need not be its own; collective.

    Args:
        source: The model.
        shapes: Its sizes.
        tp_rank: Which shard.
        tp_size: Number of shards.
        padded_vocab: Rows over all shards; rows beyond the real vocabulary are zero.
        dp_rank: Copy of the model whose layout is used; further copies load the same.
        dtype: Type of the result.
        device: Where it goes.
        is_needed: Whether this rank wants a shard; other ranks only take part.
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
        # validate_access_integrity asks for every shard exactly once, which a head alone need not give
        dist_checkpointing.load(wanted, str(source.folder / WEIGHTS), validate_access_integrity=False)
    elif is_needed:
        start, stop = tp_rank * rows, min((tp_rank + 1) * rows, shapes.vocab_size)
        if start < stop:
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
    require_whole(folder, device)
    if adapters := read_manifest(folder).get(LORA):
        attach_adapters(model, LoraSpec.from_json(adapters), groups)
    metadata = {"dp_cp_group": groups.pg.dp_cp}
    if is_headless:
        # GPTModel's own method asks for the weight of an output layer; its base class takes the modules as they are
        wanted = MegatronModule.sharded_state_dict(chunks_of(model)[0], metadata=metadata)
    else:
        wanted = model.sharded_state_dict(metadata=metadata)
    state: Any = dist_checkpointing.load(wanted, str(folder / WEIGHTS))
    # beside the weights a run's checkpoint has facts about its optimizer
    fill_model(model, {name: value for name, value in state.items() if name in wanted}, folder)
    if adapters and merges_adapters:
        merge_adapters(model)


def require_whole(folder: Path, device: torch.device) -> None:
    """Check a checkpoint's files against its manifest. Collective.

    Raises:
        CheckpointError: They do not match; on all ranks.
    """
    # dist_checkpointing unpickles its metadata: nothing may be opened whose manifest does not match
    if damage := check_everywhere(folder, device=device):
        raise CheckpointError(f"{folder} cannot be loaded: {damage}")


def fill_model(model: LocalModel, weights: dict[str, Any], folder: Path) -> None:
    """Load a state dict that came from ``folder``.

    Raises:
        CheckpointError: It lacks a parameter of the model, or has one more.
    """
    result = model.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit the model: missing {missing}, unexpected {result.unexpected_keys}"
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """Number format of the weights in a checkpoint, from its manifest."""
    return getattr(torch, read_manifest(folder)["dtype"])
