"""The training loop, strictly on-policy."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Batch, Sharding
from megatron_gkd.data.streams import PromptStream
from megatron_gkd.data.tokenizer import DataError
from megatron_gkd.parallel.groups import Job
from megatron_gkd.rollout.base import RolloutEngine
from megatron_gkd.rollout.mixing import collect_batch
from megatron_gkd.serving.errors import EngineError
from megatron_gkd.teacher.base import TeacherEngine
from megatron_gkd.train.evaluation import Evaluation
from megatron_gkd.train.lifecycle import Checkpoints, StopRequest, TrainState
from megatron_gkd.train.loss import RunLoss
from megatron_gkd.train.recorder import Recorder
from megatron_gkd.train.step import Student, attach_signals, train_step

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """A run: sample -> score -> update -> push.

    All methods are collective over the ranks of the job.
    """

    config: GkdConfig
    job: Job
    prompts: PromptStream
    rollout: RolloutEngine
    teacher: TeacherEngine
    student: Student
    loss: RunLoss
    sharding: Sharding
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    recorder: Recorder
    state: TrainState = field(default_factory=TrainState)

    def train(self, stop: StopRequest) -> Literal["done", "stopped"]:
        """Train until the last iteration or a stop request, and save.

        Raises:
            EngineError: The rollout engine or the teacher's server failed; a checkpoint was saved before.
            DataError: A row of a stream cannot be used; a checkpoint was saved before.
            TrainingFailed: Too many consecutive updates had gradients that were not finite.
        """
        train_iters = self.config.train.train_iters
        if self.state.iteration < train_iters:
            try:
                self.start()
                while self.state.iteration < train_iters and not stop.is_agreed(self.job.device):
                    self.train_iteration()
                    self.checkpoints.save_if_due(self.state, self.recorder.latest)
            except (EngineError, DataError):
                # every rank gets here alike: engines raise the same error on all ranks, and all ranks read the same rows
                self.checkpoints.save(self.state, self.recorder.latest, wait=True)
                raise
            self.checkpoints.save(self.state, self.recorder.latest, wait=True)
        outcome = "stopped" if stop.reason else "done"
        self.recorder.status(outcome, self.state.iteration, stop.reason or "all iterations are done")
        dist.barrier()  # no rank ends before the status is written
        return outcome

    def start(self) -> None:
        """Wait for the rollout engine, and give it the student's current weights."""
        self.recorder.status("running", self.state.iteration, "waiting for the generation engine")
        self.rollout.connect(self.student)
        self.rollout.push_weights(
            self.state.iteration, probe=[prompt.ids for prompt in self.prompts.first_prompts(2)]
        )
        self.recorder.start(self.state.iteration)

    def train_iteration(self) -> None:
        """One iteration, from the prompts to the push of the new weights."""
        state, student, teacher = self.state, self.student, self.teacher
        with self.recorder.iteration(state) as record:
            with restored_on_error(self.prompts):  # from the update on, the batch is consumed
                with record.timer("rollout"):
                    batch = self.collect_batch()
                micro_batches = self.sharding.micro_batches(batch)
                with record.timer("teacher"):
                    signals = teacher.score(batch, micro_batches)
            with record.timer("student"):
                lr = student.schedule.set_iteration(state.iteration)
                scored = attach_signals(batch, micro_batches, signals)
                result = train_step(student, self.loss, scored)
            # behind the update and in front of the push: the new weights are version ``state.iteration``
            state.advance(
                batch,
                is_skipped=result.is_skipped,
                max_skipped_updates=self.config.train.max_skipped_updates,
            )
            if self.evaluation is not None and self.evaluation.is_due(state.iteration):
                with record.timer("validation"):
                    self.evaluation.measure(student, teacher, self.loss, record.metrics)
            record.add_update(state, batch, result, lr)
            with record.timer("push"):
                sequences = [sample.prompt_ids + sample.completion_ids for sample in batch.samples]
                record.add_push(self.rollout.push_weights(state.iteration, probe=sequences))

    def collect_batch(self) -> Batch:
        """The samples of the next iteration."""
        config = self.config
        return collect_batch(
            self.prompts,
            self.rollout,
            iteration=self.state.iteration,
            consumed_samples=self.state.consumed_samples,
            global_batch_size=config.train.global_batch_size,
            num_samples=config.rollout.num_samples,
            lmbda=config.gkd.lmbda,
            seed=config.train.seed,
        )


@contextmanager
def restored_on_error(prompts: PromptStream) -> Iterator[None]:
    """Return the prompts of an iteration that fails, so that the checkpoint saved then loses none."""
    position = prompts.state_dict()
    try:
        yield
    except (EngineError, DataError):
        prompts.load_state_dict(position)
        raise
