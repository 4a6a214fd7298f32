"""One update of the student: Megatron's schedule with the distillation loss on the last stage, then the optimizer.

Shapes: B = sequences of a micro-batch, S = positions, T = rows that enter the loss, H = hidden size, V = vocabulary
entries of this rank.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.losses.fused_linear import LMHead
from megatron_gkd.losses.token_loss import METRIC_UNITS
from megatron_gkd.models.gpt import ShardedModel, head_weight, select_rows
from megatron_gkd.models.pipeline import evaluate_schedule, train_schedule
from megatron_gkd.optim.optimizer import (
    LearningRateSchedule,
    has_finite_gradients,
    main_grad_adder,
    zero_gradients,
)
from megatron_gkd.parallel.collectives import any_rank, reduce_values
from megatron_gkd.reshard.layout import WeightLayout
from megatron_gkd.teacher.base import Signal
from megatron_gkd.train.loss import RunLoss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student(ShardedModel):
    """The model that learns, and what trains it.

    Attributes:
        ddp: This rank's part, wrapped for data parallelism chunk by chunk.
        optimizer: Megatron's optimizer over it.
        schedule: Learning rate by iteration.
    """

    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: LearningRateSchedule

    @property
    def weights(self) -> WeightLayout:
        """The weights as slices of Hugging Face tensors."""
        return WeightLayout(self.shapes, self.groups.layout, self.model.vocab_size)


@dataclass(frozen=True)
class ScoredMicroBatch:
    """A micro-batch with its on-policy rows and the teacher's signal.

    ``signal`` is ``None`` off the student's last stage, and without a teacher.
    """

    tokens_BS: Tensor
    position_ids_BS: Tensor
    loss_mask_BS: Tensor
    is_on_policy_T: Tensor
    signal: Signal | None


@dataclass(frozen=True)
class StepResult:
    """The outcome of an update.

    Attributes:
        on_policy_loss_sum: Loss in nats summed over this rank's on-policy tokens; 0 off the last stage.
        off_policy_loss_sum: The same for the other tokens.
        grad_norm: Global norm of the gradient before clipping; NaN if the update was skipped.
        is_skipped: A gradient was not finite on some rank, so no rank changed its weights.
        metrics: Token means of the auxiliary loss metrics, equal on all ranks; names in ``METRIC_UNITS``.
    """

    on_policy_loss_sum: float
    off_policy_loss_sum: float
    grad_norm: float
    is_skipped: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


def attach_signals(
    batch: Batch, micro_batches: Sequence[MicroBatch], signals: Sequence[Signal]
) -> list[ScoredMicroBatch]:
    """Pair micro-batches with the teacher's signals; ``signals`` is empty where there are none."""
    scored = []
    for i, micro_batch in enumerate(micro_batches):
        # in the order of the rows under the mask: sequence by sequence
        samples = [batch.samples[index] for index in micro_batch.indices]
        flags = [sample.is_on_policy for sample in samples for _ in range(sample.num_loss_tokens)]
        scored.append(
            ScoredMicroBatch(
                micro_batch.tokens_BS,
                micro_batch.position_ids_BS,
                micro_batch.loss_mask_BS,
                torch.tensor(flags, dtype=torch.bool),
                signals[i] if signals else None,
            )
        )
    return scored


def train_step(student: Student, loss: RunLoss, scored: Sequence[ScoredMicroBatch]) -> StepResult:
    """Forward, backward and update; collective over all ranks.

    The gradient is that of the loss summed over all loss tokens of the global batch, divided by their number.
    """
    # Megatron adds to the buffers of the previous iteration otherwise
    zero_gradients(student.ddp, student.optimizer)
    distill = partial(_distill, student=student, loss=loss)
    reports = train_schedule(student.ddp, student.model.config, student.groups, scored, distill)
    on_policy, off_policy = _own_sums(reports, student, "loss_sums", 2)
    device = next(student.model.parameters()).device
    metrics = _mean_metrics(reports, student, device)
    is_bad = not (
        has_finite_gradients(student.ddp) and math.isfinite(on_policy) and math.isfinite(off_policy)
    )
    # agreed before the optimizer changes anything: ranks that step alone would no longer hold the same model
    if any_rank(is_bad, device=device):
        return StepResult(on_policy, off_policy, float("nan"), is_skipped=True, metrics=metrics)
    outcome: Any = student.optimizer.step()  # the base class declares no result (megatron-core 0.16.1)
    _, grad_norm, _ = outcome
    return StepResult(on_policy, off_policy, float(grad_norm or 0.0), is_skipped=False, metrics=metrics)


def evaluate_step(student: Student, loss: RunLoss, scored: Sequence[ScoredMicroBatch]) -> float:
    """This rank's part of a batch's loss, in nats summed over tokens, without gradient. Collective over all ranks."""
    distill = partial(_distill, student=student, loss=loss)
    reports = evaluate_schedule(student.model, student.model.config, student.groups, scored, distill)
    return sum(_own_sums(reports, student, "loss_sums", 2))


def _own_sums(reports: Sequence[dict[str, Tensor]], student: Student, name: str, size: int) -> list[float]:
    """This rank's sums over its micro-batches.

    0 off the last stage and on all but one of its tensor-parallel ranks, so that a sum over all ranks counts every copy once.
    """
    if not reports or student.groups.tp_rank != 0:
        return [0.0] * size
    return torch.stack([report[name] for report in reports]).sum(0).tolist()


def _distill(
    micro_batch: ScoredMicroBatch,
    hidden_BSH: Tensor,
    *,
    student: Student,
    loss: RunLoss,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mask_BS = micro_batch.loss_mask_BS.to(hidden_BSH.device)
    rows_TH = select_rows(
        hidden_BSH,
        mask_BS,
        sequence_parallel=student.model.config.sequence_parallel,
        group=student.groups.pg.tp,
    )
    # position i predicts token i + 1; the mask excludes the last column, which wraps around
    labels_T = micro_batch.tokens_BS.to(hidden_BSH.device).roll(-1, dims=1)[mask_BS]
    # a micro-batch without rows takes the same path, so that collectives match on all ranks
    head_VH = head_weight(student.model)
    head = LMHead(rows_TH, head_VH)
    result = loss(head, micro_batch.signal, labels_T, add_head_gradient=main_grad_adder(head_VH))
    loss_T = result.loss_T
    is_on_policy_T = micro_batch.is_on_policy_T.to(loss_T.device)
    # tensors, read once after the schedule: .item() here would wait for the device in every micro-batch
    sums_2 = torch.stack([(loss_T * is_on_policy_T).sum(), (loss_T * ~is_on_policy_T).sum()])
    # Megatron sums it over micro-batches and ranks, and divides the gradients by it (calculate_per_token_loss)
    num_tokens = torch.tensor(rows_TH.shape[0], dtype=torch.int, device=rows_TH.device)
    report = {"loss_sums": sums_2.detach(), "metric_sums": _summed_metrics(result.metrics, loss_T)}
    return result.total, num_tokens, report


def _summed_metrics(metrics: Mapping[str, Tensor], loss_T: Tensor) -> Tensor:
    """[2 * len(METRIC_UNITS)] sum over tokens and number of tokens of each metric; 0 for those the loss does not have."""
    sums = loss_T.new_zeros(len(METRIC_UNITS), 2)
    for i, name in enumerate(METRIC_UNITS):
        if name in metrics:
            sums[i, 0], sums[i, 1] = metrics[name].sum(), metrics[name].shape[0]
    return sums.flatten()


def _mean_metrics(
    reports: Sequence[dict[str, Tensor]], student: Student, device: torch.device
) -> dict[str, float]:
    """Means over the tokens of all ranks; collective."""
    own = _own_sums(reports, student, "metric_sums", 2 * len(METRIC_UNITS))
    totals = reduce_values(own, ["sum"] * len(own), device=device)
    return {
        name: total / count
        for name, total, count in zip(METRIC_UNITS, totals[::2], totals[1::2], strict=True)
        if count
    }
