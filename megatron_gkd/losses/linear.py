"""Losses of hidden states: the output layer is applied inside, a chunk of tokens at a time, so that logits never exist.

The gradient of the hidden states is this rank's partial sum over its part of the vocabulary: the caller puts the
region operation that adds it up over the group (Megatron's copy_to or gather_from_sequence_parallel) before the loss.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size (the student's and the teacher's may differ).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from megatron_gkd.losses.chunked import Layer, Problem, WeightedLoss, solve_per_token, solve_weighted
from megatron_gkd.losses.combine import Sum, Term
from megatron_gkd.losses.comparison import Joined
from megatron_gkd.losses.cross_entropy import LabelComparison
from megatron_gkd.losses.objective import Objective, ObjectiveOptions
from megatron_gkd.losses.softmax import (
    Group,
    first_id,
    num_real_columns,
    split_over,
)
from megatron_gkd.losses.sparse import local_entries


def linear_distill_loss(
    student_TH: Tensor,
    student_head_VH: Tensor,
    teacher_TH: Tensor,
    teacher_head_VH: Tensor,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    teacher_scale: float = 1.0,
    teacher_soft_cap: float | None = None,
    labels_T: Tensor | None = None,
    sft_weight: float = 0.0,
    group: Group = None,
    valid_vocab_size: int | None = None,
    token_weight_T: Tensor | None = None,
    tokens_per_chunk: int = 256,
    **objective: Unpack[ObjectiveOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token divergence between teacher and student, from the inputs of their output layers.

    Args:
        student_TH: [T, H] input of the student's output layer, any float dtype.
        student_head_VH: [V, H] this rank's shard of the student's output layer, same dtype.
        teacher_TH: [T, H_teacher] input of the teacher's output layer (after its final norm); receives no gradient.
        teacher_head_VH: [V, H_teacher] the same rows of the teacher's output layer; receives no gradient.
        student_bias_V: [V] bias of the student's logits.
        teacher_bias_V: [V] bias of the teacher's logits; receives no gradient.
        teacher_scale: Multiplies the teacher's logits, bias included.
        teacher_soft_cap: Bounds the teacher's logits: soft_cap tanh(logit / soft_cap), after the scale.
        labels_T: [T] global token ids for the cross-entropy; needed where ``sft_weight`` is not 0.
        sft_weight: Share of the cross-entropy: (1 - sft_weight) divergence + sft_weight cross-entropy, both from the same
            student logits. The temperature does not touch the cross-entropy.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Number of real entries of the whole vocabulary; rows of the heads beyond it are padding: they
            take no part and get gradient 0. Needs shards of equal size. ``None``: every row is real.
        token_weight_T: [T] weight of each token in the returned sum, e.g. a mask; receives no gradient.
        tokens_per_chunk: Tokens whose logits exist at one time (a row of V each), and which share their collectives.
        objective: ``divergence`` and further fields of ``Objective``.

    Returns:
        Without ``token_weight_T``: [T] loss in nats, float32 (float64 for float64 inputs), equal on all ranks of
        ``group``, right for any upstream gradient. With it: (sum of weight * loss, loss [T] without gradient); a loss of
        weight 0 still enters as 0 * loss.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    group = split_over(group)
    wanted = Objective(**objective)  # pyright: ignore[reportCallIssue]  (it asks for the divergence itself)
    student = Layer(student_TH, student_head_VH, student_bias_V)
    teacher = Layer(teacher_TH, teacher_head_VH, teacher_bias_V, teacher_scale, teacher_soft_cap)
    if not 0.0 <= sft_weight <= 1.0 or (sft_weight > 0 and labels_T is None):
        raise ValueError(
            f"sft_weight {sft_weight} needs labels_T and lies in [0, 1]; it is the share of the cross-entropy"
        )
    share = 1 - sft_weight
    goals = [logit_goal(student, teacher, wanted, labels_T, weight=share, group=group)]
    if labels_T is not None and sft_weight > 0:
        goals.append(label_goal(student, labels_T, weight=sft_weight, group=group))
    problem = _make_problem(student, goals, group, valid_vocab_size, tokens_per_chunk)
    return _solve(student, problem, token_weight_T)


def linear_top_k_distill_loss(
    student_TH: Tensor,
    student_head_VH: Tensor,
    ids_TK: Tensor,
    log_probs_TK: Tensor,
    *,
    weight_TK: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    token_weight_T: Tensor | None = None,
    tokens_per_chunk: int = 256,
    **objective: Unpack[ObjectiveOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """``top_k_distill_loss`` from the input of the student's output layer.

    Args:
        student_TH: See ``linear_distill_loss``.
        student_head_VH: See ``linear_distill_loss``. Shards are of equal size.
        ids_TK: See ``top_k_distill_loss``.
        log_probs_TK: See ``top_k_distill_loss``.
        weight_TK: See ``top_k_distill_loss``.
        student_bias_V: See ``linear_distill_loss``.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: See ``linear_distill_loss``.
        token_weight_T: See ``linear_distill_loss``.
        tokens_per_chunk: See ``linear_distill_loss``.
        objective: ``divergence``, ``tail`` and further fields of ``Objective``.

    Returns:
        As ``linear_distill_loss``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    group = split_over(group)
    wanted = Objective(**objective)  # pyright: ignore[reportCallIssue]  (it asks for the divergence itself)
    student = Layer(student_TH, student_head_VH, student_bias_V)
    goals = [entry_goal(student, ids_TK, log_probs_TK, weight_TK, wanted, weight=1.0, group=group)]
    problem = _make_problem(student, goals, group, valid_vocab_size, tokens_per_chunk)
    return _solve(student, problem, token_weight_T)


def linear_cross_entropy(
    student_TH: Tensor,
    student_head_VH: Tensor,
    labels_T: Tensor,
    *,
    student_bias_V: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    token_weight_T: Tensor | None = None,
    tokens_per_chunk: int = 256,
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token cross-entropy -log q(label), from the input of the output layer.

    Args:
        student_TH: [T, H] input of the output layer, any float dtype.
        student_head_VH: [V, H] this rank's shard of the output layer, same dtype. Shards are of equal size.
        labels_T: [T] global token ids, int64, equal on all ranks. The loss of an id that is no real entry is +inf.
        student_bias_V: [V] bias of the logits.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: See ``linear_distill_loss``.
        token_weight_T: See ``linear_distill_loss``.
        tokens_per_chunk: See ``linear_distill_loss``.

    Returns:
        As ``linear_distill_loss``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    group = split_over(group)
    student = Layer(student_TH, student_head_VH, student_bias_V)
    goals = [label_goal(student, labels_T, weight=1.0, group=group)]
    problem = _make_problem(student, goals, group, valid_vocab_size, tokens_per_chunk)
    return _solve(student, problem, token_weight_T)


class Goal(NamedTuple):
    """A term of the loss and what the student is compared with: a teacher's layer, values for each row, or several."""

    term: Term
    target: Any


def logit_goal(
    student: Layer,
    teacher: Layer,
    objective: Objective,
    labels_T: Tensor | None,
    *,
    weight: float,
    group: Group,
) -> Goal:
    """The divergence from a teacher's logits, on the support of the objective.

    Raises:
        ValueError: If the support needs labels and there are none.
    """
    target: Any = teacher
    if objective.support != "full":
        if labels_T is None and objective.support == "token":
            raise ValueError("support=token needs labels_T, the token that follows each row")
        labels_T = (
            torch.zeros_like(student.hidden_TH[:, 0], dtype=torch.int64) if labels_T is None else labels_T
        )
        target = Joined([teacher, _local_ids(student, labels_T, group)])
    return Goal(Term("divergence", weight * objective.scale, objective.against_logits(group)), target)


def entry_goal(
    student: Layer,
    ids_TK: Tensor,
    log_probs_TK: Tensor,
    weight_TK: Tensor | None,
    objective: Objective,
    *,
    weight: float,
    group: Group,
) -> Goal:
    """The divergence from a teacher's log-probabilities of some ids.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    target = local_entries(
        ids_TK,
        log_probs_TK,
        weight_TK,
        tail=objective.tail,
        num_tokens=student.hidden_TH.shape[0],
        first=first_id(student.head_VH.shape[0], group),
    )
    return Goal(Term("divergence", weight * objective.scale, objective.against_entries(group)), target)


def label_goal(student: Layer, labels_T: Tensor, *, weight: float, group: Group) -> Goal:
    """The cross-entropy of global token ids.

    Raises:
        ValueError: If ``labels_T`` is not one int64 id per row.
    """
    local_T = _local_ids(student, labels_T, group)
    return Goal(Term("cross_entropy", weight, LabelComparison(group)), local_T)


def _local_ids(student: Layer, labels_T: Tensor, group: Group) -> Tensor:
    if labels_T.shape != student.hidden_TH.shape[:1] or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels_T.shape)} {labels_T.dtype} do not fit hidden states "
            f"{tuple(student.hidden_TH.shape)}; pass one int64 token id per row"
        )
    return labels_T - first_id(student.head_VH.shape[0], group)


def weighted_loss(
    student: Layer,
    goals: Sequence[Goal],
    token_weight_T: Tensor,
    *,
    group: Group,
    valid_vocab_size: int | None,
    tokens_per_chunk: int,
) -> tuple[WeightedLoss, tuple[str, ...]]:
    """The weighted sum over tokens of any goals together, and the names of its details.

    The training path: one product with the student's head for each chunk, gradients made in the forward.
    """
    group = split_over(group)
    problem = _make_problem(student, goals, group, valid_vocab_size, tokens_per_chunk)
    return solve_weighted(student, problem, token_weight_T), problem.comparison.detail_names


def _make_problem(
    student: Layer,
    goals: Sequence[Goal],
    group: Group,
    valid_vocab_size: int | None,
    tokens_per_chunk: int,
) -> Problem:
    """The loss sum_goals weight * loss, checked.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a size is out of range.
    """
    if tokens_per_chunk < 1:
        raise ValueError(f"tokens_per_chunk {tokens_per_chunk} is not at least 1; 256 suits most shapes")
    _check_layer("student", student)
    for goal in goals:
        _check_target(student, goal.target)
    num_columns = num_real_columns(student.head_VH.shape[0], group, valid_vocab_size)

    targets = Joined(goal.target for goal in goals)
    comparison = Sum(group, tuple(goal.term for goal in goals))
    return Problem(comparison, targets, num_columns, tokens_per_chunk)


def _solve(student: Layer, problem: Problem, token_weight_T: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if token_weight_T is None:
        return solve_per_token(student, problem)
    result = solve_weighted(student, problem, token_weight_T)
    return result.total, result.loss_T


def _check_target(student: Layer, teacher: Any) -> None:
    if isinstance(teacher, Joined):
        for part in teacher:
            _check_target(student, part)
    if not isinstance(teacher, Layer):
        return
    _check_layer("teacher", teacher)
    hidden_TH, head_VH = student.hidden_TH, student.head_VH
    if hidden_TH.shape[0] != teacher.hidden_TH.shape[0] or head_VH.shape[0] != teacher.head_VH.shape[0]:
        raise ValueError(
            f"student hidden {tuple(hidden_TH.shape)} and head {tuple(head_VH.shape)} do not fit teacher hidden "
            f"{tuple(teacher.hidden_TH.shape)} and head {tuple(teacher.head_VH.shape)}: both need the same tokens and the "
            "same vocabulary rows; split and pad the teacher's head as the student's"
        )


def _check_layer(name: str, layer: Layer) -> None:
    hidden_TH, head_VH, bias_V = layer.hidden_TH, layer.head_VH, layer.bias_V
    if hidden_TH.dim() != 2 or head_VH.dim() != 2 or hidden_TH.shape[1] != head_VH.shape[1]:
        raise ValueError(
            f"{name} hidden states {tuple(hidden_TH.shape)} and head {tuple(head_VH.shape)} are not [tokens, hidden] and "
            "[local vocabulary, hidden]; flatten the tokens, and pass the weight of the output layer as it is"
        )
    if hidden_TH.dtype != head_VH.dtype:
        raise ValueError(
            f"{name} hidden states are {hidden_TH.dtype} but its head is {head_VH.dtype}; cast one of them, the product "
            "is made in their common dtype"
        )
    if bias_V is not None and bias_V.shape != head_VH.shape[:1]:
        raise ValueError(
            f"{name} bias {tuple(bias_V.shape)} does not fit its head {tuple(head_VH.shape)}; pass one number per row"
        )
