"""The run's own loss on held-out completions, between two updates; changes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Batch, Prompt, Sample
from megatron_gkd.observability.metrics import Metrics
from megatron_gkd.teacher.engine import TeacherEngine
from megatron_gkd.train.build import Student, make_micro_batches
from megatron_gkd.train.collect import sample_from_data
from megatron_gkd.train.step import attach_signals, evaluate_step

_SEED = 0


class Validation:
    """Held-out rows as batches, the same in the same order every time.

    Args:
        prompts: Rows with completions.
        config: Of the run. Batches have its size; the last one is filled up with samples that count nothing.
        pad_id: Token that fills the sequences up.
    """

    def __init__(self, prompts: Sequence[Prompt], config: GkdConfig, pad_id: int):
        self._config, self._pad_id = config, pad_id
        size = config.train.global_batch_size
        samples = [sample_from_data(prompt, 0) for prompt in prompts]
        samples += [_blank(samples[-1])] * (-len(samples) % size)
        self._batches = [Batch(tuple(samples[i : i + size])) for i in range(0, len(samples), size)]
        self._num_tokens = sum(batch.num_loss_tokens for batch in self._batches)

    def measure(
        self, student: Student, teacher: TeacherEngine, teacher_head_VH: Tensor | None, metrics: Metrics
    ) -> None:
        """Note ``validation/loss``, the mean over the tokens of all rows, and their number. Collective.

        Args:
            student: Its weights, mode and gradients stay as they are.
            teacher: Scores the batches.
            teacher_head_VH: This rank's shard of the teacher's head, on the student's last stage.
            metrics: Receives the numbers.
        """
        total = 0.0
        with own_draws(next(student.model.parameters()).device):
            for batch in self._batches:
                micro_batches = make_micro_batches(self._config, student.groups, batch, self._pad_id)
                scored = attach_signals(batch, micro_batches, teacher.score(batch, micro_batches))
                total += evaluate_step(student, teacher_head_VH, scored, self._config.loss)
        metrics.add("validation/loss", total / self._num_tokens, unit="nats/token", reduce="sum")
        metrics.add("validation/tokens", self._num_tokens, unit="tokens", reduce="rank0")


@contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """Draws of a sampled support are the same at every measurement, and leave those of training as they are."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(_SEED)
        yield


def _blank(like: Sample) -> Sample:
    """A sample whose one token counts nothing."""
    return Sample(like.row, 0, like.prompt_ids[:1], (), False, "data", -1)
