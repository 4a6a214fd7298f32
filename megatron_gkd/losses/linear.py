"""Losses of hidden states: the output layer is applied inside, a chunk of tokens at a time, so that logits never exist.

The gradient of the hidden states is this rank's partial sum over its part of the vocabulary: the caller puts the
region operation that adds it up over the group (Megatron's copy_to or gather_from_sequence_parallel) before the loss.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size (the student's and the teacher's may differ).
"""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from megatron_gkd.losses.chunked import (
    HeadGradient,
    Layer,
    Problem,
    WeightedLoss,
    solve_per_token,
    solve_weighted,
)
from megatron_gkd.losses.combine import Sum
from megatron_gkd.losses.comparison import Joined
from megatron_gkd.losses.goals import Goal, check_shapes, entry_goal, label_goal, logit_goal
from megatron_gkd.losses.objective import Objective, ObjectiveOptions
from megatron_gkd.losses.softmax import (
    Group,
    num_real_columns,
    split_over,
)

_LOGITS_PER_CHUNK = 2**24
"""64 MiB in float32."""


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


def suitable_tokens_per_chunk(num_columns: int) -> int:
    """Rows whose logits take 64 MiB in float32; not so few that the output layer's products get slow, nor ever too many."""
    return min(max(_LOGITS_PER_CHUNK // max(num_columns, 1), 256), 2048)


def weighted_loss(
    student: Layer,
    goals: Sequence[Goal],
    token_weight_T: Tensor,
    *,
    group: Group,
    valid_vocab_size: int | None,
    tokens_per_chunk: int | None,
    take_head_gradient: HeadGradient | None = None,
) -> tuple[WeightedLoss, tuple[str, ...]]:
    """The weighted sum over tokens of any goals together, and the names of its details.

    The training path: one product with the student's head for each chunk, gradients made in the forward. See
    ``chunked.solve_weighted`` for ``take_head_gradient``. Without ``tokens_per_chunk`` it comes from the shape of the head,
    whose shards are then of equal size.
    """
    group = split_over(group)
    if tokens_per_chunk is None:
        tokens_per_chunk = suitable_tokens_per_chunk(student.head_VH.shape[0])
    problem = _make_problem(student, goals, group, valid_vocab_size, tokens_per_chunk)
    result = solve_weighted(student, problem, token_weight_T, take_head_gradient)
    return result, problem.comparison.detail_names


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
    check_shapes(student, goals)
    num_columns = num_real_columns(student.head_VH.shape[0], group, valid_vocab_size)

    targets = Joined(goal.target for goal in goals)
    comparison = Sum(group, tuple(goal.term for goal in goals))
    return Problem(comparison, targets, num_columns, tokens_per_chunk)


def _solve(student: Layer, problem: Problem, token_weight_T: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if token_weight_T is None:
        return solve_per_token(student, problem)
    result = solve_weighted(student, problem, token_weight_T)
    return result.total, result.loss_T
