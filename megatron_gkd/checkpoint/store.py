"""Training checkpoints in ``checkpoints/iter_<n>/``, for a resume that is bit-identical to an uninterrupted run.

A checkpoint is written under a temporary name, hashed, and renamed; an incomplete one is never selected. Weights, optimizer
and RNG state are saved by dist_checkpointing, counters and the position in the data as JSON.
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

from megatron_gkd.checkpoint.integrity import (
    CheckpointError,
    FileDigests,
    find_damage_on_any_rank,
    hash_share,
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
from megatron_gkd.checkpoint.saving import BackgroundSave, require_space
from megatron_gkd.checkpoint.side_files import copy_side_files, replace_tokenizer
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
        hf_files: Folder with the configuration and tokenizer files that every checkpoint includes.
        groups: The student's layout and process groups.
        dtype: Data type of the weights.
        device: The device of this rank.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        best_metric: Metric whose lowest value marks the best checkpoint, which is kept too.
        tokenizer: Tokenizer folder or file that replaces the one in ``hf_files``.
        chat_template: Jinja source that replaces the tokenizer's own template.
        in_background: ``save`` returns once the tensors are copied; ``advance`` and ``finish`` complete it.
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
        """Write ``iter_<iteration>``, replacing an existing one. Collective over all ranks.

        A background save exists on disk only after ``finish``; an earlier one is finished first.

        Args:
            iteration: Completed iterations.
            model: This rank's part of the student.
            optimizer: Its optimizer.
            state: Counters, position in the data, configuration.
            metrics: Metrics of this iteration; only ``best_metric`` is used.

        Raises:
            NoSpaceError: Not enough free disk space; nothing was written.
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
        header = {
            **self._manifest_header(iteration),
            LORA: _adapters_of(model),
            "metrics": self._best_metric_of(metrics or {}),
        }
        keep_results_through_signals()
        request = dist_checkpointing.save(
            sharded, str(unfinished / WEIGHTS), async_sharded_save=self._in_background
        )
        if request is not None:
            publish = partial(self._publish, unfinished, final, header, start)
            self._unfinished = BackgroundSave(request, unfinished, publish, device=self._device)
            log.info(
                "Saving %s in the background; training was blocked for %.1f s",
                final,
                time.perf_counter() - start,
            )
            return final
        dist.barrier()  # all shards and the metadata of rank 0 are written
        share = hash_share(unfinished, dist.get_rank(), dist.get_world_size())
        self._publish(unfinished, final, header, start, share)
        return final

    def advance(self) -> None:
        """Publish the background save if it has been written. Collective over all ranks."""
        if self._unfinished is not None and self._unfinished.advance(wait=False):
            self._unfinished = None

    def finish(self) -> None:
        """Wait for the background save and publish it. Collective over all ranks."""
        if self._unfinished is not None:
            self._unfinished.advance(wait=True)
            self._unfinished = None

    def _publish(
        self, unfinished: Path, final: Path, header: dict[str, Any], start: float, share: FileDigests
    ) -> None:
        write_manifest(unfinished, header, share, device=self._device)
        if dist.get_rank() == 0:
            # rename does not replace a folder that is not empty
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            sync_folder(self._folder)
            self._apply_retention()
        dist.barrier()  # no rank returns before the checkpoint has its final name
        log.info("Saved %s in %.1f s", final, time.perf_counter() - start)

    def find_newest_valid(self) -> Path | None:
        """Return the newest checkpoint whose files match its manifest, or ``None`` without any.

        Damaged ones are skipped with a warning. Collective over all ranks.

        Raises:
            CheckpointError: All checkpoints are damaged.
        """
        # Rank 0's listing: on a network file system the ranks may see different ones for a moment.
        names = broadcast_json([p.name for p in finished_checkpoints(self._folder)], device=self._device)
        damages = []
        for name in reversed(names):
            damage = find_damage_on_any_rank(self._folder / name, device=self._device)
            if damage is None:
                return self._folder / name
            log.warning("Skipping checkpoint %s: %s", name, damage)
            damages.append(f"{name}: {damage}")
        # Not a silent start from scratch, which would also make the damaged checkpoints the older ones.
        if damages:
            raise CheckpointError(
                f"none of the {len(damages)} checkpoints in {self._folder} is intact ({damages[0]}); restore a copy, or start "
                "from scratch with checkpoint.resume=false, which moves them aside"
            )
        return None

    def set_aside_after(self, iteration: int) -> None:
        """Move the checkpoints of later iterations to ``superseded/``. Collective over all ranks."""
        if dist.get_rank() == 0:
            set_aside_after(self._folder, iteration)
        dist.barrier()

    def load(self, folder: Path, model: LocalModel, optimizer: MegatronOptimizer) -> dict[str, Any]:
        """Restore model, optimizer and RNG state; return the JSON state. Collective over all ranks."""
        manifest = read_manifest(folder)
        _check_same_adapters(folder, manifest, model)
        # RNG states belong to ranks and device types and cannot be resharded. They matter for dropout and for drawn
        # supports only.
        header = self._manifest_header(0)
        has_rng = all(manifest.get(key) == header[key] for key in ("layout", "device"))
        wanted = self._sharded(model, optimizer, with_rng=has_rng, is_loading=True)
        loaded: Any = dist_checkpointing.load(wanted, str(folder / WEIGHTS))
        fill_model(model, loaded["model"], folder)
        load_optimizer_state(optimizer, loaded["optimizer"])
        if has_rng:
            _set_rng_state(loaded[_RNG], self._device)
        return json.loads((folder / STATE_FILE).read_text())

    def _best_metric_of(self, metrics: Mapping[str, float]) -> dict[str, float]:
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
        # Layer by layer: by default Megatron stacks the optimizer state of all layers into one tensor, which would have
        # holes where layers are frozen.
        by_layer = model.sharded_state_dict(metadata={**metadata, "non_homogeneous_layers": True})
        of_optimizer = sharded_optimizer_state(
            optimizer, by_layer, is_loading=is_loading, device=self._device
        )
        state = {"model": weights, "optimizer": of_optimizer}
        if with_rng:
            state[_RNG] = _sharded_rng_state(self._device)
        return state

    def _manifest_header(self, iteration: int) -> dict[str, Any]:
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
        spec.pop("dropout")  # has no weights, so it may change between runs
    if saved != present:
        raise CheckpointError(
            f"{folder} was saved with student.lora {saved or 'off'}, this run has {present or 'off'}; restore that setting, "
            "or start a new run from it with student.checkpoint"
        )


def _sharded_rng_state(device: torch.device) -> dict[str, ShardedTensor]:
    """Return this rank's RNG states as rows of byte tensors."""
    # Tensors instead of objects, which dist_checkpointing would pickle.
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"{_RNG}.{name}", value.unsqueeze(0), (0, rank, world))
        for name, value in _rng_state(device).items()
    }


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    # default: the CPU generator; the tracker: Megatron's model-parallel generators
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
