"""The run's own loss on held-out completions, between two updates; weights and random state stay unchanged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Batch, Prompt, Sample, Sharding
from megatron_gkd.observability.metrics import Metrics
from megatron_gkd.rollout.mixing import sample_from_data
from megatron_gkd.teacher.base import TeacherEngine
from megatron_gkd.train.loss import RunLoss
from megatron_gkd.train.step import Student, attach_signals, evaluate_step

_SEED = 0


class Evaluation:
    """Held-out rows as batches, equal and in equal order at every measurement.

    Args:
        prompts: Rows with completions.
        config: Of the run. Batches have its size; the last one is filled with samples without loss tokens.
        sharding: How this rank cuts its share of a batch.
    """

    def __init__(self, prompts: Sequence[Prompt], config: GkdConfig, sharding: Sharding):
        self._config, self._sharding = config, sharding
        size = config.train.global_batch_size
        samples = [sample_from_data(prompt, 0) for prompt in prompts]
        # a schedule needs full batches; the added samples are short and have no loss tokens
        samples += [_without_loss(samples[-1])] * (-len(samples) % size)
        self._batches = [Batch(tuple(samples[i : i + size])) for i in range(0, len(samples), size)]
        self._num_tokens = sum(batch.num_loss_tokens for batch in self._batches)

    def is_due(self, iteration: int) -> bool:
        """Whether to measure after ``iteration`` iterations."""
        intervals = [self._config.evaluation.interval]
        if self._config.checkpoint.keep_best_metric == "validation/loss":
            intervals.append(self._config.checkpoint.save_interval)
        is_last = iteration == self._config.train.train_iters
        return is_last or any(interval > 0 and iteration % interval == 0 for interval in intervals)

    def measure(self, student: Student, teacher: TeacherEngine, loss: RunLoss, metrics: Metrics) -> None:
        """Add ``validation/loss``, the mean over the tokens of all rows, and their number. Collective.

        Args:
            student: Its weights, mode and gradients stay unchanged.
            teacher: Scores the batches.
            loss: The loss of the run.
            metrics: Receives the numbers.
        """
        total = 0.0
        with own_draws(next(student.model.parameters()).device):
            for batch in self._batches:
                micro_batches = self._sharding.micro_batches(batch)
                scored = attach_signals(batch, micro_batches, teacher.score(batch, micro_batches))
                total += evaluate_step(student, loss, scored)
        metrics.add("validation/loss", total / self._num_tokens, unit="nats/token", reduce="sum")
        metrics.add("validation/tokens", self._num_tokens, unit="tokens", reduce="rank0")


@contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """Fix the draws of a sampled support inside the block, and leave those of training unchanged."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(_SEED)
        yield


def _without_loss(like: Sample) -> Sample:
    return Sample(like.row, 0, like.prompt_ids[:1], (), False, "data", -1)
