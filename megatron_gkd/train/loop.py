"""The run: one iteration after the other, strictly on-policy, saved and stopped in order."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_gkd.checkpoint.saving import NoSpaceError
from megatron_gkd.checkpoint.store import CheckpointStore
from megatron_gkd.config import GkdConfig
from megatron_gkd.config.resume import is_named, permitted_changes
from megatron_gkd.data.sample import Batch, Prompt
from megatron_gkd.data.streams import PromptsChanged, PromptStream
from megatron_gkd.data.tokenizer import DataError, Tokenizer
from megatron_gkd.observability.run_folder import State
from megatron_gkd.parallel.groups import Job
from megatron_gkd.rollout.base import PushReport, RolloutEngine
from megatron_gkd.serving.errors import EngineError
from megatron_gkd.teacher.engine import TeacherEngine
from megatron_gkd.train.backend import with_backend_of
from megatron_gkd.train.build import Student, build_student, build_teacher, make_micro_batches
from megatron_gkd.train.collect import collect_batch
from megatron_gkd.train.loss import certify_run
from megatron_gkd.train.records import Records
from megatron_gkd.train.state import TrainState
from megatron_gkd.train.step import ScoredMicroBatch, StepResult, attach_signals, train_step
from megatron_gkd.train.stop import StopRequest
from megatron_gkd.train.validation import Validation

log = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and what to look at."""


@dataclass
class Trainer:
    """The parts of a run."""

    config: GkdConfig
    job: Job
    tokenizer: Tokenizer
    loader: PromptStream
    student: Student
    teacher: TeacherEngine
    teacher_head_VH: Tensor | None
    rollout: RolloutEngine
    store: CheckpointStore
    records: Records
    validation: Validation | None = None
    state: TrainState = field(default_factory=TrainState)
    saved_iteration: int = 0

    def resume(self) -> None:
        """Continue from the newest valid checkpoint, if the configuration says so and there is one. Collective.

        Checkpoints of later iterations, damaged or of an earlier run, are moved aside.
        """
        found = self.store.find_newest_valid() if self.config.checkpoint.resume else None
        if found is not None:
            self._load(found)
        self.store.set_aside_after(self.state.iteration)

    def _load(self, found: Path) -> None:
        for change in permitted_changes(found, self.config):
            log.info("Changed since the checkpoint: %s", change)
        stored = self.store.load(found, self.student.model, self.student.optimizer)
        self.state = TrainState.from_json(stored["train"])
        self._restore_loader(stored["loader"])
        self.saved_iteration = self.state.iteration
        log.info("Resuming from %s, iteration %d", found, self.state.iteration)

    def _restore_loader(self, stored: dict[str, Any]) -> None:
        try:
            self.loader.load_state_dict(stored)
        except PromptsChanged as error:
            if not all(is_named(key, self.config.checkpoint.allow_changes) for key in error.keys):
                raise
            log.info("Changed since the checkpoint: the prompts; they are read from their beginning")

    def save(self) -> None:
        """Write a checkpoint of the present state, unless there is one. Collective.

        Raises:
            NoSpaceError: The disk is full.
        """
        if self.saved_iteration == self.state.iteration:
            return
        stored = {
            "train": self.state.to_json(),
            "loader": self.loader.state_dict(),
            "config": self.config.model_dump(mode="json"),
        }
        self.store.save(
            self.state.iteration, self.student.model, self.student.optimizer, stored, self.records.latest
        )
        self.saved_iteration = self.state.iteration

    def save_finally(self) -> None:
        """``save``, and return when the checkpoint is there."""
        self.save()
        self.store.finish()

    def run(self, stop: StopRequest) -> State:
        """Train until the last iteration or a stop request; returns ``done`` or ``stopped``. Collective.

        Raises:
            EngineError: The generation engine or the teacher's server failed; a checkpoint was saved before.
            DataError: A row of a stream cannot be used; the same.
            TrainingFailed: Too many updates in a row had gradients that were not finite.
        """
        train = self.config.train
        if self.state.iteration >= train.train_iters:
            return "done"
        self.records.status("running", self.state.iteration, "waiting for the generation engine")
        try:
            self.connect_rollout()
            self.records.start(self.state.iteration)
            while self.state.iteration < train.train_iters:
                if stop.is_agreed(self.job.device):
                    self.save_finally()
                    return "stopped"
                self._iterate()
                self.store.advance()
                self._save_if_due()
        except (EngineError, DataError):
            # every rank gets here alike: engines raise the same error on all of them, and all read the same rows
            self.save_finally()
            raise
        self.save_finally()
        return "done"

    def connect_rollout(self) -> None:
        """Wait for the engine, and give it the student's current weights. Collective."""
        self.rollout.connect(self.student)
        probe = [prompt.ids for prompt in self.loader.first_prompts(2)]
        self.rollout.push_weights(self.state.iteration, probe)

    def _iterate(self) -> None:
        timers, state = self.records.timers, self.state
        with timers("iteration"):
            batch, scored = self._collect_and_score()
            with timers("student"):
                lr = self.student.schedule.set_iteration(state.iteration)
                result = train_step(self.student, self.teacher_head_VH, scored, self.config.loss)
            self._advance(batch, result)
            if self.validation is not None and self._is_validation_due():
                with timers("validation"):
                    self.validation.measure(
                        self.student, self.teacher, self.teacher_head_VH, self.records.metrics
                    )
            with timers("push"):
                push, failure = self._push(batch)
        self.records.finish_iteration(state, batch, result, lr, push)
        if failure is not None:
            raise failure

    def _push(self, batch: Batch) -> tuple[PushReport | None, EngineError | None]:
        """Push the new weights; an error is returned, because the update is done and goes into the records."""
        probe = [s.prompt_ids + s.completion_ids for s in batch.samples]
        try:
            return self.rollout.push_weights(self.state.iteration, probe), None
        except EngineError as error:
            return None, error

    def _collect_and_score(self) -> tuple[Batch, list[ScoredMicroBatch]]:
        timers, position = self.records.timers, self.loader.state_dict()
        try:
            with timers("rollout"):
                batch = self._collect()
            micro_batches = make_micro_batches(self.config, self.student.groups, batch, self.tokenizer.pad_id)
            with timers("teacher"):
                signals = self.teacher.score(batch, micro_batches)
        except (EngineError, DataError):
            self.loader.load_state_dict(position)  # no prompt of the unfinished iteration is lost
            raise
        return batch, attach_signals(batch, micro_batches, signals)

    def _collect(self) -> Batch:
        config = self.config
        return collect_batch(
            self.loader,
            self.rollout,
            self.state,
            global_batch_size=config.train.global_batch_size,
            num_samples=config.rollout.num_samples,
            lmbda=config.gkd.lmbda,
            seed=config.train.seed,
        )

    def _advance(self, batch: Batch, result: StepResult) -> None:
        state = self.state
        state.iteration += 1
        state.consumed_samples += len(batch.samples)
        state.consumed_tokens += batch.num_loss_tokens
        state.on_policy_tokens += sum(len(s.completion_ids) for s in batch.samples if s.is_on_policy)
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.is_skipped else 0
        if not result.is_skipped:
            return
        state.skipped_updates += 1
        log.warning("Iteration %d: a gradient is not finite; no rank changed its weights", state.iteration)
        if state.skipped_in_a_row > self.config.train.max_skipped_updates:
            raise TrainingFailed(
                f"{state.skipped_in_a_row} updates in a row had gradients that are not finite; lower optim.lr, check the "
                "teacher's weights, or raise train.max_skipped_updates"
            )

    def _is_validation_due(self) -> bool:
        marks_best = self.config.checkpoint.keep_best_metric == "validation/loss"
        return (
            self.state.iteration == self.config.train.train_iters
            or self._is_multiple_of(self.config.evaluation.interval)
            or (marks_best and self._is_multiple_of(self.config.checkpoint.save_interval))
        )

    def _is_multiple_of(self, interval: int) -> bool:
        return interval > 0 and self.state.iteration % interval == 0

    def _save_if_due(self) -> None:
        interval = self.config.checkpoint.save_interval
        if not self._is_multiple_of(interval):
            return
        try:
            self.save()
        except NoSpaceError as error:
            log.error("%s. Training goes on; the next try is in %d iterations", error, interval)


def build_trainer(
    config: GkdConfig,
    job: Job,
    tokenizer: Tokenizer,
    loader: PromptStream,
    validation_prompts: tuple[Prompt, ...],
    rollout: RolloutEngine,
) -> Trainer:
    """All parts of a run around the engine, which was started before. Collective.

    Args:
        config: Checked configuration.
        job: This process.
        tokenizer: The student's tokenizer.
        loader: The prompts.
        validation_prompts: Held-out rows; none: no validation.
        rollout: Its engine.
    """
    student = build_student(config, job)
    config = with_backend_of(config, student, job.device)
    if config.loss.certify:
        certify_run(config, student.groups, job.device)
    teacher, teacher_head_VH = build_teacher(config, job, student, tokenizer.pad_id)
    store = CheckpointStore(
        config.checkpoint_dir,
        hf_files=config.student.hf_folder,
        groups=student.groups,
        dtype=student.dtype,
        device=job.device,
        keep_last=config.checkpoint.keep_last,
        best_metric=config.checkpoint.keep_best_metric,
        tokenizer=config.data.tokenizer,
        chat_template=tokenizer.chat_template if config.data.chat_template else None,
        in_background=config.checkpoint.async_save,
    )
    records = Records(config, job, tokenizer)
    validation = Validation(validation_prompts, config, tokenizer.pad_id) if validation_prompts else None
    return Trainer(
        config,
        job,
        tokenizer,
        loader,
        student,
        teacher,
        teacher_head_VH,
        rollout,
        store,
        records,
        validation,
    )
