"""Training checkpoints: ``checkpoints/iter_<n>/`` with everything a run needs to go on as if it had not stopped.

A checkpoint is written beside its final name, hashed, and renamed; what is half-written is never chosen. Weights,
optimizer and random state are saved by dist_checkpointing, counters and the loader's position as JSON.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer

from megatron_gkd.checkpoint.background import BackgroundSave
from megatron_gkd.checkpoint.integrity import (
    CheckpointError,
    FileFacts,
    check_everywhere,
    describe_share,
    read_manifest,
    sync_folder,
    write_manifest,
)
from megatron_gkd.checkpoint.results_queue import keep_results_through_signals
from megatron_gkd.checkpoint.retention import (
    UNFINISHED,
    find_best,
    link_best,
    remove_superseded,
    set_aside_after,
)
from megatron_gkd.checkpoint.side_files import copy_side_files, replace_tokenizer
from megatron_gkd.checkpoint.space import require_space
from megatron_gkd.checkpoint.weights import HF_FILES, LORA, WEIGHTS, fill_model
from megatron_gkd.config.resume import STATE_FILE, finished_checkpoints
from megatron_gkd.models.gpt import LocalModel
from megatron_gkd.models.lora import attached_spec
from megatron_gkd.optim.state import load_optimizer_state, sharded_optimizer_state
from megatron_gkd.parallel.collectives import broadcast_json
from megatron_gkd.parallel.groups import ModelGroups

log = logging.getLogger(__name__)

_RNG = "rng_state"
_DEVICE_RNG = "device"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: ``<output_dir>/checkpoints``.
        hf_files: Folder whose config and tokenizer files every checkpoint carries along.
        groups: The student's layout and groups.
        dtype: Number format of the weights.
        device: The device of this rank.
        keep_last: Number of newest checkpoints that stay; 0: all.
        best_metric: Metric whose lowest value marks the best checkpoint, which stays, too.
        tokenizer: Folder or file of the tokenizer that goes with the weights in place of that of ``hf_files``.
        chat_template: Jinja text that goes with them in place of the tokenizer's own.
        in_background: ``save`` returns as soon as the tensors are copied; ``advance`` and ``finish`` do the rest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hf_files: Path,
        groups: ModelGroups,
        dtype: torch.dtype,
        device: torch.device,
        keep_last: int = 0,
        best_metric: str | None = None,
        tokenizer: Path | None = None,
        chat_template: str | None = None,
        in_background: bool = False,
    ):
        self._folder, self._hf_files = folder, hf_files
        self._groups, self._dtype, self._device = groups, dtype, device
        self._keep_last, self._best_metric = keep_last, best_metric
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._in_background = in_background
        self._unfinished: BackgroundSave | None = None

    def save(
        self,
        iteration: int,
        model: LocalModel,
        optimizer: MegatronOptimizer,
        state: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write ``iter_<iteration>``; an existing one of that name is replaced. Collective over all ranks.

        In the background the folder is there after ``finish`` only; an earlier save is finished first.

        Args:
            iteration: Finished iterations.
            model: This rank's part of the student.
            optimizer: Its optimizer.
            state: Counters, position of the loader, configuration.
            metrics: Metrics of this iteration; only the one that marks the best checkpoint is used.

        Raises:
            NoSpaceError: The disk has no room; nothing was written.
        """
        self.finish()
        start = time.perf_counter()
        final = self._folder / f"iter_{iteration:07d}"
        unfinished = final.with_name(final.name + UNFINISHED)
        sharded = self._sharded(model, optimizer, with_rng=True)
        if dist.get_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        require_space(self._folder, sharded, device=self._device)
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / WEIGHTS).mkdir(parents=True)
            copy_side_files(self._hf_files, unfinished / HF_FILES)
            replace_tokenizer(unfinished / HF_FILES, self._tokenizer, self._chat_template)
            (unfinished / STATE_FILE).write_text(json.dumps(state, indent=1))
        dist.barrier()
        facts = {
            **self._facts(iteration),
            LORA: _adapters_of(model),
            "metrics": self._noted_metrics(metrics or {}),
        }
        keep_results_through_signals()
        request = dist_checkpointing.save(
            sharded, str(unfinished / WEIGHTS), async_sharded_save=self._in_background
        )
        if request is not None:
            publish = partial(self._publish, unfinished, final, facts, start)
            self._unfinished = BackgroundSave(request, unfinished, publish, device=self._device)
            log.info(
                "Saving %s in the background; training waited %.1f s", final, time.perf_counter() - start
            )
            return final
        dist.barrier()
        share = describe_share(unfinished, dist.get_rank(), dist.get_world_size())
        self._publish(unfinished, final, facts, start, share)
        return final

    def advance(self) -> None:
        """Publish a checkpoint that was written in the background, if it is complete. Collective over all ranks."""
        if self._unfinished is not None and self._unfinished.advance(wait=False):
            self._unfinished = None

    def finish(self) -> None:
        """Wait for a save in the background and publish it. Collective over all ranks."""
        if self._unfinished is not None:
            self._unfinished.advance(wait=True)
            self._unfinished = None

    def _publish(
        self, unfinished: Path, final: Path, facts: dict[str, Any], start: float, share: FileFacts
    ) -> None:
        write_manifest(unfinished, facts, share, device=self._device)
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            sync_folder(self._folder)
            self._apply_retention()
        dist.barrier()
        log.info("Saved %s in %.1f s", final, time.perf_counter() - start)

    def find_newest_valid(self) -> Path | None:
        """The checkpoint of the highest iteration whose files match its manifest; ``None`` if there is none at all.

        Damaged ones are passed over with a warning, unfinished ones in silence. Collective over all ranks.

        Raises:
            CheckpointError: All are damaged.
        """
        names = broadcast_json([p.name for p in finished_checkpoints(self._folder)], device=self._device)
        damages = []
        for name in reversed(names):
            damage = check_everywhere(self._folder / name, device=self._device)
            if damage is None:
                return self._folder / name
            log.warning("Passing over checkpoint %s: %s", name, damage)
            damages.append(f"{name}: {damage}")
        if damages:
            raise CheckpointError(
                f"none of the {len(damages)} checkpoints in {self._folder} is whole ({damages[0]}); put a copy back, or start "
                "anew with checkpoint.resume=false, which moves them aside"
            )
        return None

    def set_aside_after(self, iteration: int) -> None:
        """Move checkpoints of later iterations aside, for this run goes on without them. Collective over all ranks."""
        if dist.get_rank() == 0:
            set_aside_after(self._folder, iteration)
        dist.barrier()

    def load(self, folder: Path, model: LocalModel, optimizer: MegatronOptimizer) -> dict[str, Any]:
        """Fill model, optimizer and random state; returns the JSON state. Collective over all ranks.

        The random state is restored only into the layout, and on the kind of device, that saved it (it is unused without
        dropout and drawn supports).
        """
        manifest = read_manifest(folder)
        _check_same_adapters(folder, manifest, model)
        facts = self._facts(0)
        same_place = all(manifest.get(key) == facts[key] for key in ("layout", "device"))
        wanted = self._sharded(model, optimizer, with_rng=same_place, is_loading=True)
        loaded: Any = dist_checkpointing.load(wanted, str(folder / WEIGHTS))
        fill_model(model, loaded["model"], folder)
        load_optimizer_state(optimizer, loaded["optimizer"])
        if same_place:
            _set_rng_state(loaded[_RNG], self._device)
        return json.loads((folder / STATE_FILE).read_text())

    def _noted_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        name = self._best_metric
        if name is None:
            return {}
        if name not in metrics:
            log.info("%s was not measured in this iteration: its checkpoint cannot be the best", name)
            return {}
        return {name: metrics[name]} if math.isfinite(metrics[name]) else {}

    def _apply_retention(self) -> None:
        best = find_best(self._folder, self._best_metric) if self._best_metric else None
        if best is not None:
            link_best(best)
        remove_superseded(self._folder, keep_last=self._keep_last, best=best)

    def _sharded(self, model, optimizer, *, with_rng: bool, is_loading: bool = False) -> dict[str, Any]:
        metadata = {"dp_cp_group": self._groups.pg.dp_cp}
        weights = model.sharded_state_dict(metadata=metadata)
        # layer by layer: Megatron would else want one tensor over all layers, and frozen ones have no state
        by_layer = model.sharded_state_dict(metadata={**metadata, "non_homogeneous_layers": True})
        of_optimizer = sharded_optimizer_state(
            optimizer, by_layer, is_loading=is_loading, device=self._device
        )
        state = {"model": weights, "optimizer": of_optimizer}
        if with_rng:
            state[_RNG] = _sharded_rng_state(self._device)
        return state

    def _facts(self, iteration: int) -> dict[str, Any]:
        layout = self._groups.layout
        return {
            "kind": "training",
            "iteration": iteration,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
            "layout": {"tp_size": layout.tp_size, "pp_size": layout.pp_size, "num_ranks": layout.num_ranks},
        }


def _adapters_of(model: LocalModel) -> dict[str, Any] | None:
    spec = attached_spec(model)
    return spec.to_json() if spec else None


def _check_same_adapters(folder: Path, manifest: dict[str, Any], model: LocalModel) -> None:
    saved, present = manifest.get(LORA), _adapters_of(model)
    for spec in filter(None, (saved, present)):
        spec.pop("dropout")  # may change during a run
    if saved != present:
        raise CheckpointError(
            f"{folder} was saved with student.lora {saved or 'off'}, this run has {present or 'off'}; set it back, or "
            "start a new run from it with student.checkpoint"
        )


def _sharded_rng_state(device: torch.device) -> dict[str, ShardedTensor]:
    """Random state of every rank as rows of byte tensors; no pickled objects."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"{_RNG}.{name}", value.unsqueeze(0), (0, rank, world))
        for name, value in _rng_state(device).items()
    }


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"default": torch.get_rng_state()}
    if device.type != "cpu":
        state[_DEVICE_RNG] = torch.get_device_module(device).get_rng_state(device)
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    for name, value in tracker.get_states().items():
        state[name] = value.cpu()
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    rows = {name: value[0].cpu() for name, value in state.items()}
    torch.set_rng_state(rows.pop("default"))
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(rows.pop(_DEVICE_RNG), device)
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(rows)
