"""Hugging Face folders to Megatron checkpoints and back, bit for bit."""

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
    describe_share,
    read_manifest,
    sync_folder,
    write_manifest,
)
from megatron_gkd.checkpoint.side_files import copy_side_files
from megatron_gkd.checkpoint.weights import (
    HF_FILES,
    LORA,
    WEIGHTS,
    require_whole,
    stored_dtype,
)
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.models.gpt import LocalModel, build_gpt
from megatron_gkd.models.lora import LoraSpec, attach_adapters, merged_parameters
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
from megatron_gkd.reshard.transport import HfFolder, MappedSafetensors, find_difference, read_slices

log = logging.getLogger(__name__)


def convert_hf_to_megatron(
    hf: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write a folder that ``student.checkpoint`` and ``teacher.checkpoint`` accept. For a job of one rank.

    The weights are written from the files' own pages; only the fused q, k and v are put together in memory.

    Raises:
        ConfigError: ``config.json`` is missing or describes a model that is not supported.
        FileExistsError: ``out`` exists.
        ValueError: The folder lacks a tensor, or mixes number formats.
        CheckpointError: What was written is not what was read.
    """
    unfinished = unfinished_folder(out)
    shapes = load_hf_shapes(hf)
    source, dtype = HfFolder(hf), _common_dtype(hf, shapes)
    start = time.perf_counter()
    model = build_for_conversion(shapes, groups, kernels, dtype, device, is_uninitialized=True)
    slices = _slices_by_parameter(model, shapes, groups)
    (unfinished / WEIGHTS).mkdir(parents=True)
    log.info("Writing %s with %d million weights", out, shapes.num_parameters // 10**6)
    dist_checkpointing.save(_sharded_from(source, model, slices, groups), str(unfinished / WEIGHTS))
    for name, tensor in _with_progress(
        "Verified", stream_weights(model, groups, unfinished / WEIGHTS), shapes
    ):
        if different := find_difference({name: tensor}, source, slices[name]):
            raise CheckpointError(
                f"{unfinished} has other numbers than {different} in {hf}; is the disk sound?"
            )
    copy_side_files(hf, unfinished / HF_FILES)
    share = describe_share(unfinished, dist.get_rank(), dist.get_world_size())
    write_manifest(unfinished, {"kind": "weights", "dtype": _name(dtype)}, share, device=device)
    unfinished.rename(out)
    sync_folder(out.parent)
    log.info("Wrote %s in %.1f s", out, time.perf_counter() - start)


def convert_megatron_to_hf(
    checkpoint: Path, out: Path, groups: ModelGroups, kernels: Kernels, device: torch.device
) -> None:
    """Write a Hugging Face folder that transformers and SGLang load, from a converted or a training checkpoint.

    Adapters are added to the weights. For a job of one rank; one parameter at a time is in memory.

    Raises:
        CheckpointError: The checkpoint is damaged, or what was written is not what was read.
        FileExistsError: ``out`` exists.
    """
    unfinished = unfinished_folder(out)
    shapes, dtype = load_hf_shapes(checkpoint / HF_FILES), stored_dtype(checkpoint)
    start = time.perf_counter()
    require_whole(checkpoint, device)
    model = build_for_conversion(shapes, groups, kernels, dtype, device, is_uninitialized=True)
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
            raise CheckpointError(f"{file}: {different} is not what was written; is the disk sound?")
    unfinished.rename(out)
    log.info("Wrote %s in %.1f s", out, time.perf_counter() - start)


def export_weights(
    model: LocalModel, file: Path, shapes: HfShapes, groups: ModelGroups, dtype: torch.dtype
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
    write_together(file, MappedSafetensors(hf_tensors(shapes), dtype), parameters, mine, groups)


def write_together(
    file: Path,
    target: MappedSafetensors,
    parameters: Mapping[str, Tensor],
    slices: Sequence[Slice],
    groups: ModelGroups,
) -> None:
    """Let each rank write its slices into one file. Collective over the groups' ranks."""
    if dist.get_rank() == 0:
        target.create(file)
    dist.barrier()
    if groups.dp_rank == 0:
        target.write(file, parameters, slices)
    dist.barrier()


def unfinished_folder(out: Path) -> Path:
    """Where ``out`` is written until it is complete; what an earlier attempt left there is removed."""
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another --out")
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    return unfinished


def build_for_conversion(
    shapes: HfShapes,
    groups: ModelGroups,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_uninitialized: bool = False,
) -> LocalModel:
    """A model as the converters need it; see ``build_gpt``."""
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
    """The model's ``sharded_state_dict``, with tensors of the files in place of the blank weights.

    On one rank a parameter is the tensor of the file, except gate and up, which Megatron stores one after the other, and
    q, k and v, whose rows it mixes.
    """
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
    """Hand the parameters on and log every tenth of the model that is done."""
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
