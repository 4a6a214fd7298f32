"""Prove a loss on the machine, layout, number format and chunk that it is to run with.

The loss under test and a dense float64 reference see the same small problem: some chunks of tokens, of which the last is
not full, over a vocabulary with padding. Value, gradient of the hidden states and gradient of the head are compared, with
a random weight for each token.

The logits are formed without rounding: what is measured is the loss, and the rounding of the gradients to the format of the
inputs.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size, K = known entries.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.config.loss import LossSettings
from megatron_gkd.losses.distill import DistillLoss
from megatron_gkd.losses.divergences import DIVERGENCES
from megatron_gkd.losses.verify.problem import (
    TOP_K,
    Case,
    Problem,
    Shard,
    known_entries,
    make_problem,
    rows_of_rank,
    shard_of,
    teacher_logits,
)
from megatron_gkd.losses.verify.reference import (
    dense_cross_entropy,
    dense_divergence,
    dense_estimate,
    dense_known,
    dense_support,
    dense_top_k,
    relative_error,
)
from megatron_gkd.parallel.gathering import Group, split_over

TOLERANCES = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 4e-3)}
"""Largest relative L2 error of the value and of a gradient. The gradients of hidden states and head are rounded to the format
of the inputs: in bfloat16 by 1.7e-3 in the mean and 2**-8 at most, and a GPU rounds that of the logits as well."""


class CertificateError(RuntimeError):
    """The loss is not what its formula says, so nothing may be trained with it."""


LossUnderTest = Callable[[Shard], tuple[Tensor, Tensor]]
"""-> (weighted sum to differentiate, loss_T)."""


@dataclass(frozen=True)
class Certificate:
    """The errors of one loss: relative L2 distances to float64."""

    case: Case
    tp_size: int
    value_error: float
    student_error: float
    head_error: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the value's error and of a gradient's."""
        return TOLERANCES[self.case.dtype]

    @property
    def is_passed(self) -> bool:
        """Whether every error is within its bound; NaN is not."""
        value_bound, gradient_bound = self.bounds
        errors = self.student_error, self.head_error
        return self.value_error <= value_bound and all(error <= gradient_bound for error in errors)

    def __str__(self) -> str:
        value_bound, gradient_bound = self.bounds
        return (
            f"{self.case}, {str(self.case.dtype).removeprefix('torch.')}, tensor parallel {self.tp_size}, chunks of "
            f"{self.case.tokens_per_chunk}: relative error {self.value_error:.1e} of the value (at most "
            f"{value_bound:.0e}), {self.student_error:.1e} and {self.head_error:.1e} of the gradients of hidden states "
            f"and head (at most {gradient_bound:.0e})"
        )


def certify(
    case: Case, *, group: Group, device: torch.device, loss: LossUnderTest | None = None
) -> Certificate:
    """Compare a loss with the float64 reference; collective over ``group``.

    Args:
        case: Which loss.
        group: Tensor-parallel group, or ``None``.
        device: Where the loss is to run; the reference runs on the CPU.
        loss: What is tested in place of the package's own loss.
    """
    group = split_over(group)
    rank, tp_size = (0, 1) if group is None else (group.rank(), group.size())
    case = case.scaled_down(tp_size)
    problem = make_problem(case.num_tokens, case.vocab_size(tp_size))
    shard = shard_of(problem, case, rank, tp_size, device)
    total, loss_T = (loss or loss_of_training(case, group))(shard)
    total.backward()
    student_grad_TH, head_grad_VH = shard.student.hidden_TH.grad, shard.student.weight_VH.grad
    assert head_grad_VH is not None
    assert student_grad_TH is not None
    want_T, want_student_TH, want_head_VH = _reference(problem, case)
    whole_student_TH = student_grad_TH.double()
    if group is not None:
        dist.all_reduce(whole_student_TH, group=group)
    want_rows_VH = rows_of_rank(want_head_VH, case, rank, tp_size, fill=0.0)
    squares = torch.stack(
        [(head_grad_VH.double().cpu() - want_rows_VH).square().sum(), want_rows_VH.square().sum()]
    ).to(device)
    if group is not None:
        dist.all_reduce(squares, group=group)
    return Certificate(
        case,
        tp_size,
        relative_error(loss_T.detach().cpu(), want_T),
        relative_error(whole_student_TH.cpu(), want_student_TH),
        (squares[0] / squares[1]).sqrt().item(),
    )


def loss_of_training(case: Case, group: Group) -> LossUnderTest:
    """The path that training takes."""

    def loss(shard: Shard) -> tuple[Tensor, Tensor]:
        distill = DistillLoss(
            case.settings or LossSettings(),
            sft_weight=case.sft_weight,
            tokens_per_chunk=case.tokens_per_chunk,
            group=group,
            valid_vocab_size=shard.valid_vocab_size,
        )
        teacher = shard.known if case.from_entries else shard.teacher
        result = distill.weighted(
            shard.student,
            None if case.settings is None else teacher,
            shard.labels_T,
            token_weight_T=shard.weight_T,
        )
        return result.total, result.loss_T

    return loss


def _reference(problem: Problem, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_T, gradient of the hidden states, gradient of the head) in float64."""
    student_TH = problem.student_TH.clone().requires_grad_()
    head_VH = problem.student_head_VH.clone().requires_grad_()
    student_TV = student_TH @ head_VH.T
    value_T = surrogate_T = torch.zeros_like(problem.weight_T)
    if case.settings is not None:
        value_T, surrogate_T = _reference_divergence(problem, case, case.settings, student_TV)
    if case.sft_weight > 0:
        cross_entropy_T = case.sft_weight * dense_cross_entropy(student_TV, problem.labels_T)
        value_T = (1 - case.sft_weight) * value_T + cross_entropy_T
        surrogate_T = (1 - case.sft_weight) * surrogate_T + cross_entropy_T
    (surrogate_T * problem.weight_T).sum().backward()
    assert student_TH.grad is not None
    assert head_VH.grad is not None
    return value_T.detach(), student_TH.grad, head_VH.grad


def _reference_divergence(
    problem: Problem, case: Case, settings: LossSettings, student_TV: Tensor
) -> tuple[Tensor, Tensor]:
    """[T] (the loss, what has its gradient), with the limit and the factor of the settings."""
    name, support = settings.divergence, settings.support
    x_TV = student_TV / settings.temperature
    y_TV = teacher_logits(problem, case) / (settings.teacher_temperature or settings.temperature)
    how = {key: getattr(settings, key) for key in inspect.signature(DIVERGENCES[name]).parameters}
    if support == "token":
        value_T, surrogate_T = dense_estimate(
            x_TV, y_TV, problem.labels_T, settings.estimator, settings.policy_gradient
        )
    elif case.from_entries:
        known = dense_known(*known_entries(problem, case), y_TV.shape[1])
        value_T = surrogate_T = dense_top_k(x_TV, *known, name, settings.tail, **how)
    elif support in ("full", "sampled"):
        value_T = surrogate_T = dense_divergence(x_TV, y_TV, name, **how)
    else:
        mask_TV = dense_support(x_TV, y_TV, support, TOP_K)
        value_T = surrogate_T = dense_top_k(x_TV, mask_TV, y_TV.softmax(-1), name, settings.tail, **how)
    if settings.max_token_loss is not None:
        limit = settings.max_token_loss
        surrogate_T = torch.where(value_T.abs() > limit, 0.0, surrogate_T)
        value_T = value_T.clamp(-limit, limit)
    scale = settings.temperature**2 if settings.temperature_squared else 1.0
    return scale * value_T, scale * surrogate_T
