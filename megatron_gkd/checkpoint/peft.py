"""Adapters of a training checkpoint as a folder that PEFT loads."""

import json
import logging
from pathlib import Path

import torch

from megatron_gkd.checkpoint.hf import build_for_conversion, unfinished_folder, write_together
from megatron_gkd.checkpoint.integrity import CheckpointError
from megatron_gkd.checkpoint.weights import HF_FILES, WeightSource, load_weights, stored_dtype
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.models.gpt import LocalModel
from megatron_gkd.models.lora import attached_spec
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.kernels import Kernels
from megatron_gkd.reshard.layout import WeightLayout
from megatron_gkd.reshard.lora import adapter_slices, peft_modules, peft_tensors
from megatron_gkd.reshard.transport import MappedSafetensors

log = logging.getLogger(__name__)


def convert_megatron_to_peft(
    checkpoint: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write the adapters of a training checkpoint as a folder that PEFT loads. For a job of one rank.

    Raises:
        CheckpointError: The checkpoint is damaged, or has no adapters.
        FileExistsError: ``out`` exists.
    """
    unfinished = unfinished_folder(out)
    shapes, dtype = load_hf_shapes(checkpoint / HF_FILES), stored_dtype(checkpoint)
    model = build_for_conversion(shapes, groups, kernels, dtype, device)
    source = WeightSource(checkpoint, True)
    load_weights(model, source, shapes, groups, merges_adapters=False, device=device)
    spec = attached_spec(model)
    if spec is None:
        raise CheckpointError(f"{checkpoint} has no adapters; export its weights without --adapter")
    unfinished.mkdir(parents=True)
    export_adapters(model, unfinished / "adapter_model.safetensors", shapes, groups, dtype)
    modules = peft_modules(WeightLayout(shapes, groups.layout, model.vocab_size), spec.targets)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": modules,
        "bias": "none",
    }
    (unfinished / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    unfinished.rename(out)
    log.info("Wrote %s", out)


def export_adapters(
    model: LocalModel, file: Path, shapes: HfShapes, groups: ModelGroups, dtype: torch.dtype
) -> None:
    """Write a model's adapters under PEFT's names. Collective over the groups' ranks."""
    weights, spec = WeightLayout(shapes, groups.layout, model.vocab_size), attached_spec(model)
    assert spec is not None  # a model without adapters has nothing to write
    parameters = dict(model.named_parameters())
    mine = adapter_slices(
        weights, spec.rank, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters
    )
    target = MappedSafetensors(peft_tensors(weights, spec.rank, spec.targets), dtype)
    write_together(file, target, parameters, mine, groups)
