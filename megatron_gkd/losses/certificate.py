"""Prove a loss on the machine, layout, number format and chunk that it is to run with.

The loss under test and a dense float64 reference see the same small problem: some chunks of tokens, of which the last is
not full, over a vocabulary with padding. Value, gradient of the hidden states and gradient of the head are compared, with
a random weight for each token.

The logits are formed without rounding: what is measured is the loss, and the rounding of the gradients to the format of the
inputs.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size, K = known entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.losses.certificate_problem import (
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
from megatron_gkd.losses.goals import Goal, entry_goal, label_goal, logit_goal
from megatron_gkd.losses.linear import weighted_loss
from megatron_gkd.losses.objective import Objective
from megatron_gkd.losses.reference import (
    dense_cross_entropy,
    dense_divergence,
    dense_estimate,
    dense_known,
    dense_support,
    dense_top_k,
    relative_error,
)
from megatron_gkd.losses.softmax import Group, split_over

TOLERANCES = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-6, 4e-3),
}
"""Largest relative L2 error of the value and of a gradient. The gradients of hidden states and head are rounded to the format
of the inputs: in bfloat16 by 1.7e-3 in the mean and 2**-8 at most, and a GPU rounds that of the logits as well."""


_MAX_SCALE, _MIN_SOFT_CAP = 2.0, 10.0


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
    problem = make_problem(case.num_tokens, 61 * tp_size)
    case = _scaled_down(case, len(problem.student_head_VH))
    shard = shard_of(problem, case, rank, tp_size, device)
    total, loss_T = (loss or _own_loss(case, group))(shard)
    total.backward()
    head_grad_VH, student_grad_TH = shard.student.head_VH.grad, shard.student.hidden_TH.grad
    assert head_grad_VH is not None
    assert student_grad_TH is not None
    want_T, want_student_TH, want_head_VH = _reference(problem, case)
    whole_student_TH = student_grad_TH.double()
    if group is not None:
        dist.all_reduce(whole_student_TH, group=group)
    want_rows_VH = rows_of_rank(want_head_VH, rank, tp_size, fill=0.0)
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


def _own_loss(case: Case, group: Group) -> LossUnderTest:
    """The path that training takes."""

    def loss(shard: Shard) -> tuple[Tensor, Tensor]:
        goals = []
        if case.objective is not None:
            goals.append(_divergence_goal(case, case.objective, shard, group))
        if case.sft_weight > 0:
            goals.append(label_goal(shard.student, shard.labels_T, weight=case.sft_weight, group=group))
        result, _ = weighted_loss(
            shard.student,
            goals,
            shard.weight_T,
            group=group,
            valid_vocab_size=shard.valid_vocab_size,
            tokens_per_chunk=case.tokens_per_chunk,
        )
        return result.total, result.loss_T

    return loss


def _divergence_goal(case: Case, objective: Objective, shard: Shard, group: Group) -> Goal:
    weight = 1 - case.sft_weight
    if case.from_entries:
        entries = shard.ids_TK, shard.log_probs_TK, None
        return entry_goal(shard.student, *entries, objective, weight=weight, group=group)
    return logit_goal(shard.student, shard.teacher, objective, shard.labels_T, weight=weight, group=group)


def _scaled_down(case: Case, vocab: int) -> Case:
    """With the number of entries that the problem has, and logits of its size."""
    if case.objective is None:
        return case
    top_k, cap = vocab if case.objective.support == "sampled" else TOP_K, case.teacher_soft_cap
    return replace(
        case,
        objective=replace(case.objective, top_k=top_k),
        teacher_scale=min(case.teacher_scale, _MAX_SCALE),
        teacher_soft_cap=cap and max(cap, _MIN_SOFT_CAP),
    )


def _reference(problem: Problem, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_T, gradient of the hidden states, gradient of the head) in float64."""
    student_TH = problem.student_TH.clone().requires_grad_()
    head_VH = problem.student_head_VH.clone().requires_grad_()
    student_TV = student_TH @ head_VH.T
    value_T = surrogate_T = torch.zeros_like(problem.weight_T)
    if case.objective is not None:
        value_T, surrogate_T = _reference_divergence(problem, case, case.objective, student_TV)
    if case.sft_weight > 0:
        cross_entropy_T = case.sft_weight * dense_cross_entropy(student_TV, problem.labels_T)
        value_T = (1 - case.sft_weight) * value_T + cross_entropy_T
        surrogate_T = (1 - case.sft_weight) * surrogate_T + cross_entropy_T
    (surrogate_T * problem.weight_T).sum().backward()
    assert student_TH.grad is not None
    assert head_VH.grad is not None
    return value_T.detach(), student_TH.grad, head_VH.grad


def _reference_divergence(
    problem: Problem, case: Case, objective: Objective, student_TV: Tensor
) -> tuple[Tensor, Tensor]:
    """[T] (the loss, what has its gradient), with the limit and the factor of the objective."""
    x_TV = student_TV / objective.temperatures.student
    y_TV = teacher_logits(problem, case) / objective.temperatures.teacher
    how: dict[str, Any] = {"beta": objective.beta, "alpha": objective.alpha, "weight": objective.weight}
    if objective.support == "token":
        value_T, surrogate_T = dense_estimate(
            x_TV, y_TV, problem.labels_T, objective.estimator, objective.policy_gradient
        )
    elif case.from_entries:
        known = dense_known(*known_entries(problem, case), y_TV.shape[1])
        value_T = surrogate_T = dense_top_k(x_TV, *known, objective.divergence, objective.tail, **how)
    elif objective.support in ("full", "sampled"):
        value_T = surrogate_T = dense_divergence(x_TV, y_TV, objective.divergence, **how)
    else:
        mask_TV = dense_support(x_TV, y_TV, objective.support, TOP_K)
        p_TV = y_TV.softmax(-1)
        value_T = surrogate_T = dense_top_k(x_TV, mask_TV, p_TV, objective.divergence, objective.tail, **how)
    if objective.max_token_loss is not None:
        limit = objective.max_token_loss
        surrogate_T = torch.where(value_T.abs() > limit, 0.0, surrogate_T)
        value_T = value_T.clamp(-limit, limit)
    return objective.scale * value_T, objective.scale * surrogate_T
