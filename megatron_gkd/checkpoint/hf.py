"""Hugging Face folders to Megatron checkpoints and back, bit for bit."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_gkd.checkpoint.integrity import CheckpointError, sync_folder, write_manifest
from megatron_gkd.checkpoint.weights import HF_FILES, WEIGHTS, WeightSource, load_weights, stored_dtype
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.models.gpt import build_gpt
from megatron_gkd.models.lora import attached_spec, merged_parameters
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.kernels import Kernels
from megatron_gkd.reshard.layout import (
    Slice,
    WeightLayout,
    all_owned_slices,
    check_coverage,
    hf_tensors,
    owned_slices,
)
from megatron_gkd.reshard.lora import adapter_slices, peft_modules, peft_tensors
from megatron_gkd.reshard.transport import HfFolder, MappedSafetensors

log = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and chat template of a Hugging Face folder: every file that holds no weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)


def convert_hf_to_megatron(
    hf: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write a folder that ``student.checkpoint`` and ``teacher.checkpoint`` accept. For a job of one rank.

    Raises:
        ConfigError: ``config.json`` is missing or describes a model that is not supported.
        FileExistsError: ``out`` exists.
        ValueError: The folder lacks a tensor, or mixes number formats.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    shapes = load_hf_shapes(hf)
    dtype = _common_dtype(hf, shapes)
    start = time.perf_counter()
    model = _build(shapes, groups, kernels, dtype, device)
    load_weights(model, WeightSource(hf, False), shapes, groups, device=device)
    log.info("Read %s in %.1f s", hf, time.perf_counter() - start)
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / WEIGHTS).mkdir(parents=True)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.pg.dp_cp})
    dist_checkpointing.save(sharded, str(unfinished / WEIGHTS))
    copy_side_files(hf, unfinished / HF_FILES)
    write_manifest(unfinished, {"kind": "weights", "dtype": _name(dtype)}, device=device)
    unfinished.rename(out)
    sync_folder(out.parent)
    log.info("Wrote %s in %.1f s", out, time.perf_counter() - start)


def convert_megatron_to_hf(
    checkpoint: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write a Hugging Face folder that transformers and SGLang load, from a converted or a training checkpoint.

    Adapters are added to the weights. For a job of one rank.

    Raises:
        CheckpointError: The checkpoint is damaged.
        FileExistsError: ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    shapes, dtype = load_hf_shapes(checkpoint / HF_FILES), stored_dtype(checkpoint)
    start = time.perf_counter()
    model = _build(shapes, groups, kernels, dtype, device)
    load_weights(model, WeightSource(checkpoint, True), shapes, groups, device=device)
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    copy_side_files(checkpoint / HF_FILES, unfinished)
    _set_dtype(unfinished / "config.json", dtype)
    export_weights(model, unfinished / "model.safetensors", shapes, groups, dtype)
    unfinished.rename(out)
    log.info("Wrote %s in %.1f s", out, time.perf_counter() - start)


def convert_megatron_to_peft(
    checkpoint: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write the adapters of a training checkpoint as a folder that PEFT loads. For a job of one rank.

    Raises:
        CheckpointError: The checkpoint is damaged, or has no adapters.
        FileExistsError: ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    shapes, dtype = load_hf_shapes(checkpoint / HF_FILES), stored_dtype(checkpoint)
    model = _build(shapes, groups, kernels, dtype, device)
    source = WeightSource(checkpoint, True)
    load_weights(model, source, shapes, groups, merges_adapters=False, device=device)
    spec = attached_spec(model)
    if spec is None:
        raise CheckpointError(f"{checkpoint} has no adapters; export its weights without --adapter")
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
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


def export_weights(
    model: GPTModel, file: Path, shapes: HfShapes, groups: ModelGroups, dtype: torch.dtype
) -> None:
    """Write a model in any layout as one safetensors file, each rank its own slices. Collective over the groups' ranks.

    Adapters are added to the weights.

    Raises:
        ValueError: The ranks' slices do not cover every tensor exactly once.
    """
    weights = WeightLayout(shapes, groups.layout, model.vocab_size)
    parameters = merged_parameters(model)
    check_coverage(shapes, all_owned_slices(weights))
    mine = owned_slices(weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters)
    _write_together(file, MappedSafetensors(hf_tensors(shapes), dtype), parameters, mine, groups)


def export_adapters(
    model: GPTModel, file: Path, shapes: HfShapes, groups: ModelGroups, dtype: torch.dtype
) -> None:
    """Write a model's adapters under PEFT's names. Collective over the groups' ranks."""
    weights, spec = WeightLayout(shapes, groups.layout, model.vocab_size), attached_spec(model)
    assert spec is not None  # a model without adapters has nothing to write
    parameters = dict(model.named_parameters())
    mine = adapter_slices(
        weights, spec.rank, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters
    )
    target = MappedSafetensors(peft_tensors(weights, spec.rank, spec.targets), dtype)
    _write_together(file, target, parameters, mine, groups)


def _write_together(
    file: Path,
    target: MappedSafetensors,
    parameters: Mapping[str, Tensor],
    slices: Sequence[Slice],
    groups: ModelGroups,
) -> None:
    if dist.get_rank() == 0:
        target.create(file)
    dist.barrier()
    if groups.dp_rank == 0:
        target.write(file, parameters, slices)
    dist.barrier()


def _build(
    shapes, groups: ModelGroups, kernels: Kernels, dtype: torch.dtype, device: torch.device
) -> GPTModel:
    return build_gpt(
        shapes,
        groups,
        dtype=dtype,
        device=device,
        kernels=kernels,
        max_seq_length=shapes.max_position_embeddings,
    )


def _common_dtype(hf: Path, shapes: HfShapes) -> torch.dtype:
    source = HfFolder(hf)
    missing = [name for name in hf_tensors(shapes) if name not in source.names]
    if missing:
        raise ValueError(f"{hf} lacks {len(missing)} tensors that config.json asks for, first {missing[0]!r}")
    kinds = {source.dtype(name) for name in hf_tensors(shapes)}
    if len(kinds) > 1:
        raise ValueError(f"{hf} mixes number formats {sorted(map(str, kinds))}; save it in one format first")
    return kinds.pop()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    # training may have used another format than the folder it started from
    config = json.loads(config_file.read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) != _name(dtype):
        config[key] = _name(dtype)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
