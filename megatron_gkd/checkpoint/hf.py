"""Bit-for-bit conversion between Hugging Face folders and Megatron checkpoints.

The converters run on one rank. Adapters are merged on export, or written in PEFT's format.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_gkd.checkpoint.blocks import stream_weights
from megatron_gkd.checkpoint.integrity import (
    CheckpointError,
    hash_share,
    read_manifest,
    sync_folder,
    write_manifest,
)
from megatron_gkd.checkpoint.side_files import copy_side_files
from megatron_gkd.checkpoint.weights import (
    HF_FILES,
    LORA,
    WEIGHTS,
    WeightSource,
    load_weights,
    require_intact,
    stored_dtype,
)
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.models.gpt import LocalModel, build_gpt
from megatron_gkd.models.lora import LoraSpec, attach_adapters, attached_spec, merged_parameters
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.kernels import Kernels
from megatron_gkd.reshard.layout import (
    Slice,
    WeightLayout,
    check_coverage,
    hf_tensors,
    owned_slices,
)
from megatron_gkd.reshard.lora import adapter_slices, peft_modules, peft_tensors
from megatron_gkd.reshard.transport import HfFolder, MappedSafetensors, find_difference, read_slices

log = logging.getLogger(__name__)


def convert_hf_to_megatron(
    hf: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write a checkpoint for ``student.checkpoint`` or ``teacher.checkpoint``.

    Weights are written from the memory-mapped files; only the fused QKV is assembled in memory.

    Raises:
        ConfigError: ``config.json`` is missing or describes an unsupported model.
        FileExistsError: ``out`` exists.
        ValueError: The folder lacks a tensor, or mixes data types.
        CheckpointError: Reading the result back gives other values.
    """
    unfinished = _temporary_folder(out)
    shapes = load_hf_shapes(hf)
    source, dtype = HfFolder(hf), _common_dtype(hf, shapes)
    start = time.perf_counter()
    model = _build_model(shapes, groups, kernels, dtype, device, is_uninitialized=True)
    slices = _slices_by_parameter(model, shapes, groups)
    (unfinished / WEIGHTS).mkdir(parents=True)
    log.info("Writing %s with %d million weights", out, shapes.num_parameters // 10**6)
    dist_checkpointing.save(_sharded_from(source, model, slices, groups), str(unfinished / WEIGHTS))
    # Read back through the index of the checkpoint, not from memory: a wrong sharding entry would be found as well.
    for name, tensor in _with_progress(
        "Verified", stream_weights(model, groups, unfinished / WEIGHTS), shapes
    ):
        if different := find_difference({name: tensor}, source, slices[name]):
            raise CheckpointError(
                f"{unfinished} has other values than {different} in {hf}; is the disk faulty?"
            )
    copy_side_files(hf, unfinished / HF_FILES)
    share = hash_share(unfinished, dist.get_rank(), dist.get_world_size())
    write_manifest(unfinished, {"kind": "weights", "dtype": _name(dtype)}, share, device=device)
    unfinished.rename(out)
    sync_folder(out.parent)
    log.info("Wrote %s in %.1f s", out, time.perf_counter() - start)


def convert_megatron_to_hf(
    checkpoint: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write a Hugging Face folder for transformers and SGLang from any Megatron checkpoint.

    Adapters are merged into the weights. One parameter at a time is in memory.

    Raises:
        CheckpointError: The checkpoint is damaged, or reading the result back gives other values.
        FileExistsError: ``out`` exists.
    """
    unfinished = _temporary_folder(out)
    shapes, dtype = load_hf_shapes(checkpoint / HF_FILES), stored_dtype(checkpoint)
    start = time.perf_counter()
    require_intact(checkpoint, device)
    model = _build_model(shapes, groups, kernels, dtype, device, is_uninitialized=True)
    if adapters := read_manifest(checkpoint).get(LORA):
        attach_adapters(model, LoraSpec.from_json(adapters), groups)
    slices = _slices_by_parameter(model, shapes, groups)
    check_coverage(shapes, [piece for pieces in slices.values() for piece in pieces])
    copy_side_files(checkpoint / HF_FILES, unfinished)
    _set_dtype(unfinished / "config.json", dtype)
    file, target = unfinished / "model.safetensors", MappedSafetensors(hf_tensors(shapes), dtype)
    target.create(file)
    written = HfFolder(unfinished)
    for name, tensor in _with_progress("Wrote", stream_weights(model, groups, checkpoint / WEIGHTS), shapes):
        target.write(file, {name: tensor}, slices[name])
        if different := find_difference({name: tensor}, written, slices[name]):
            raise CheckpointError(f"{file}: {different} differs from what was written; is the disk faulty?")
    unfinished.rename(out)
    log.info("Wrote %s in %.1f s", out, time.perf_counter() - start)


def convert_megatron_to_peft(
    checkpoint: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write the adapters of a training checkpoint as a folder for PEFT.

    Raises:
        CheckpointError: The checkpoint is damaged, or has no adapters.
        FileExistsError: ``out`` exists.
    """
    unfinished = _temporary_folder(out)
    shapes, dtype = load_hf_shapes(checkpoint / HF_FILES), stored_dtype(checkpoint)
    model = _build_model(shapes, groups, kernels, dtype, device)
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
        # Unknown here, and a path of this machine would not be valid elsewhere.
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
    assert spec is not None  # callers check for adapters
    parameters = dict(model.named_parameters())
    mine = adapter_slices(
        weights, spec.rank, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters
    )
    target = MappedSafetensors(peft_tensors(weights, spec.rank, spec.targets), dtype)
    write_together(file, target, parameters, mine, groups)


def write_together(
    file: Path,
    target: MappedSafetensors,
    parameters: Mapping[str, Tensor],
    slices: Sequence[Slice],
    groups: ModelGroups,
) -> None:
    """Write the ranks' slices into one file. Collective over the groups' ranks."""
    if dist.get_rank() == 0:
        target.create(file)
    dist.barrier()  # the file has its size before others write into it
    if groups.dp_rank == 0:  # data-parallel replicas hold the same values
        target.write(file, parameters, slices)
    dist.barrier()


def _temporary_folder(out: Path) -> Path:
    """Return the folder to write ``out`` into, without leftovers of an earlier attempt."""
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    return unfinished


def _build_model(
    shapes: HfShapes,
    groups: ModelGroups,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_uninitialized: bool = False,
) -> LocalModel:
    return build_gpt(
        shapes,
        groups,
        dtype=dtype,
        device=device,
        kernels=kernels,
        max_seq_length=shapes.max_position_embeddings,
        is_uninitialized=is_uninitialized,
    )


def _slices_by_parameter(model: LocalModel, shapes: HfShapes, groups: ModelGroups) -> dict[str, list[Slice]]:
    weights = WeightLayout(shapes, groups.layout, model.vocab_size)
    names = list(merged_parameters(model))
    slices: dict[str, list[Slice]] = {name: [] for name in names}
    for piece in owned_slices(weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=names):
        slices[piece.parameter].append(piece)
    return slices


def _sharded_from(
    source: HfFolder, model: LocalModel, slices: dict[str, list[Slice]], groups: ModelGroups
) -> dict[str, Any]:
    """Return the model's ``sharded_state_dict`` with mapped tensors of the files as data."""
    # On one rank a parameter equals a tensor of the file, with two exceptions: linear_fc1 is gate and up (stored as two
    # tensors), and linear_qkv interleaves the rows of q, k and v per query group.
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": groups.pg.dp_cp})
    for name, parameter in model.named_parameters():
        entry, pieces = sharded[name], slices[name]
        if isinstance(entry, ShardedTensorFactory):
            halves: Any = entry.build()
            sharded[name] = [
                replace(half, data=source.mapped(piece.tensor))
                for half, piece in zip(halves, pieces, strict=True)
            ]
        elif len(pieces) == 1:
            sharded[name] = replace(entry, data=source.mapped(pieces[0].tensor))
        else:
            read_slices({name: parameter}, source, pieces)
    return sharded


def _with_progress(
    verb: str, parameters: Iterable[tuple[str, Tensor]], shapes: HfShapes
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters, and log every 10 % of the model."""
    done, reported = 0, 0
    for name, tensor in parameters:
        yield name, tensor
        done += tensor.numel()
        tenths = 10 * done // shapes.num_parameters
        if tenths > reported:
            reported = tenths
            log.info("%s %d %% (%.2f GiB)", verb, 10 * tenths, done * tensor.element_size() / 2**30)


def _common_dtype(hf: Path, shapes: HfShapes) -> torch.dtype:
    source = HfFolder(hf)
    missing = [name for name in hf_tensors(shapes) if name not in source.names]
    if missing:
        raise ValueError(
            f"{hf} lacks {len(missing)} tensors required by config.json, the first is {missing[0]!r}"
        )
    dtypes = {source.dtype(name) for name in hf_tensors(shapes)}
    # A checkpoint has one dtype in its manifest, and casting would break the bit-for-bit conversion.
    if len(dtypes) > 1:
        raise ValueError(f"{hf} mixes data types {sorted(map(str, dtypes))}; save it in one data type first")
    return dtypes.pop()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    # Training may have used another data type than the folder it started from.
    config = json.loads(config_file.read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 renamed it
    if config.get(key) != _name(dtype):
        config[key] = _name(dtype)
        config_file.write_text(json.dumps(config, indent=2) + "\n")
