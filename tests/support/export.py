"""A model in any layout as one safetensors file, for comparisons with other layouts and with transformers."""

from pathlib import Path

import torch

from megatron_gkd.checkpoint.hf import write_together
from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.models.gpt import LocalModel
from megatron_gkd.models.lora import merged_parameters
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.reshard.layout import (
    WeightLayout,
    all_owned_slices,
    check_coverage,
    hf_tensors,
    owned_slices,
)
from megatron_gkd.reshard.transport import MappedSafetensors


def export_weights(
    model: LocalModel, file: Path, shapes: HfShapes, groups: ModelGroups, dtype: torch.dtype
) -> None:
    """Write all weights under Hugging Face names, adapters merged; each rank writes its slices. Collective."""
    weights = WeightLayout(shapes, groups.layout, model.vocab_size)
    parameters = merged_parameters(model)
    check_coverage(shapes, all_owned_slices(weights))
    mine = owned_slices(weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters)
    write_together(file, MappedSafetensors(hf_tensors(shapes), dtype), parameters, mine, groups)
