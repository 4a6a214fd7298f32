"""Progress, checkpoints and the end of a run."""

import logging
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.checkpoint.saving import NoSpaceError
from megatron_gkd.checkpoint.store import CheckpointStore
from megatron_gkd.config import GkdConfig
from megatron_gkd.config.resume import is_named, permitted_changes
from megatron_gkd.data.sample import Batch
from megatron_gkd.data.streams import PromptsChanged, PromptStream
from megatron_gkd.observability.run_folder import StopFile
from megatron_gkd.parallel.collectives import any_rank, gather_json
from megatron_gkd.train.step import Student

log = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message gives the cause and what to check."""


@dataclass
class TrainState:
    """Counters of a run, stored in every checkpoint.

    Attributes:
        iteration: Finished iterations.
        consumed_samples: Sequences trained on.
        consumed_tokens: Loss tokens trained on.
        on_policy_tokens: Completion tokens sampled from the student.
        skipped_updates: Iterations without an update, because a gradient was not finite.
        skipped_in_a_row: The most recent consecutive ones of them.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    on_policy_tokens: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0

    def advance(self, batch: Batch, *, is_skipped: bool, max_skipped_updates: int) -> None:
        """Count an iteration.

        Args:
            batch: Its samples.
            is_skipped: Its gradients were not finite, so the weights are unchanged.
            max_skipped_updates: Consecutive ones that are accepted.

        Raises:
            TrainingFailed: More consecutive updates were skipped.
        """
        self.iteration += 1
        self.consumed_samples += len(batch.samples)
        self.consumed_tokens += batch.num_loss_tokens
        self.on_policy_tokens += sum(len(s.completion_ids) for s in batch.samples if s.is_on_policy)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        if not is_skipped:
            return
        self.skipped_updates += 1
        log.warning("Iteration %d: a gradient is not finite; no rank changed its weights", self.iteration)
        if self.skipped_in_a_row > max_skipped_updates:
            raise TrainingFailed(
                f"{self.skipped_in_a_row} updates in a row had gradients that are not finite; lower optim.lr, check the "
                "teacher's weights, or raise train.max_skipped_updates"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """Inverse of ``to_json``."""
        return cls(**value)


class Checkpoints:
    """When a run saves, and what its checkpoints hold.

    Args:
        store: Reads and writes them.
        config: Of the run.
        student: Its weights and optimizer are saved.
        prompts: Their position is saved.
    """

    def __init__(self, store: CheckpointStore, config: GkdConfig, student: Student, prompts: PromptStream):
        self._store, self._config, self._student, self._prompts = store, config, student, prompts
        self._saved_iteration = 0

    def resume(self) -> TrainState:
        """Continue from the newest valid checkpoint, if the configuration says so and there is one. Collective.

        Checkpoints of later iterations, damaged or of an earlier run, are moved aside.
        """
        found = self._store.find_newest_valid() if self._config.checkpoint.resume else None
        state = TrainState() if found is None else self._load(found)
        self._store.set_aside_after(state.iteration)
        return state

    def save(self, state: TrainState, metrics: Mapping[str, float], *, wait: bool = False) -> None:
        """Save, unless this iteration is saved already. Collective.

        Args:
            state: Counters.
            metrics: Of the last iteration; one of them may mark the best checkpoint.
            wait: Return when the checkpoint is complete, also with ``checkpoint.async_save``.

        Raises:
            NoSpaceError: The disk is full.
        """
        if self._saved_iteration != state.iteration:
            stored = {
                "train": state.to_json(),
                "loader": self._prompts.state_dict(),
                "config": self._config.model_dump(mode="json"),
            }
            self._store.save(state.iteration, self._student.model, self._student.optimizer, stored, metrics)
            self._saved_iteration = state.iteration
        if wait:
            self._store.finish()

    def save_if_due(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Save every ``checkpoint.save_interval`` iterations; a full disk is logged and training goes on. Collective."""
        self._store.advance()  # publishes a background save that all ranks have finished
        interval = self._config.checkpoint.save_interval
        if interval <= 0 or state.iteration % interval:
            return
        try:
            self.save(state, metrics)
        except NoSpaceError as error:
            log.error("%s. Training goes on; the next attempt is in %d iterations", error, interval)

    def _load(self, found: Path) -> TrainState:
        for change in permitted_changes(found, self._config):
            log.info("Changed since the checkpoint: %s", change)
        # after the check: loading fills model and optimizer in place
        stored = self._store.load(found, self._student.model, self._student.optimizer)
        state = TrainState.from_json(stored["train"])
        self._restore_prompts(stored["loader"])
        self._saved_iteration = state.iteration
        log.info("Resuming from %s, iteration %d", found, state.iteration)
        return state

    def _restore_prompts(self, stored: dict[str, Any]) -> None:
        try:
            self._prompts.load_state_dict(stored)
        except PromptsChanged as error:
            if not all(is_named(key, self._config.checkpoint.allow_changes) for key in error.keys):
                raise
            log.info("Changed since the checkpoint: the prompts; they are read from their beginning")


class StopRequest:
    """SIGTERM, SIGINT or the stop file of a run.

    Args:
        output_dir: Folder of the run.

    Attributes:
        reason: Why the ranks agreed to stop; empty while they did not.
    """

    def __init__(self, output_dir: Path) -> None:
        self.reason = ""
        self._file = StopFile(output_dir)
        self._signal_name: str | None = None

    def listen(self) -> None:
        """Install the handlers; a second signal of a kind ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def is_agreed(self, device: torch.device) -> bool:
        """Whether any rank received a request; the same answer and reason on every rank. Collective."""
        # one small all-reduce per iteration; the reasons are gathered only if there is one
        own = f"stopped by {self._signal_name}" if self._signal_name else self._file.read()
        if not any_rank(own is not None, device=device):
            return False
        self.reason = next(reason for reason in gather_json(own, device=device) if reason is not None)
        return True

    def _note(self, number: int, _frame) -> None:
        # no more than this: the handler runs between any two instructions, perhaps inside a collective
        self._signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
