"""Losses of hidden states: the output layer is applied inside, a chunk of tokens at a time, so that logits never exist.

The gradient of the hidden states is this rank's partial sum over its part of the vocabulary: the caller puts the
region operation that adds it up over the group (Megatron's copy_to or gather_from_sequence_parallel) before the loss.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size (the student's and the teacher's may differ).
"""

from functools import partial

import torch
from torch import Tensor

from megatron_gkd.losses.chunked import Problem, label_chunks, logit_chunks, solve
from megatron_gkd.losses.comparison import make_comparison
from megatron_gkd.losses.cross_entropy import LabelComparison
from megatron_gkd.losses.divergences import make_divergence
from megatron_gkd.losses.softmax import Group, accumulation_dtype, num_real_columns, split_over


def linear_distill_loss(
    student_TH: Tensor,
    student_head_VH: Tensor,
    teacher_TH: Tensor,
    teacher_head_VH: Tensor,
    *,
    divergence: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    weight: float = 0.5,
    temperature: float = 1.0,
    group: Group = None,
    valid_vocab_size: int | None = None,
    token_weight_T: Tensor | None = None,
    tokens_per_chunk: int = 256,
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token divergence between teacher and student, from the inputs of their output layers.

    Args:
        student_TH: [T, H] input of the student's output layer, any float dtype.
        student_head_VH: [V, H] this rank's shard of the student's output layer, same dtype.
        teacher_TH: [T, H_teacher] input of the teacher's output layer (after its final norm); receives no gradient.
        teacher_head_VH: [V, H_teacher] the same rows of the teacher's output layer; receives no gradient.
        divergence: A name in ``DIVERGENCES``; formulas in ``losses.divergences``.
        beta: See ``distill_loss``.
        alpha: See ``distill_loss``.
        weight: See ``distill_loss``.
        temperature: Divides both logits; the loss is not multiplied by temperature**2.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Number of real entries of the whole vocabulary; rows of the heads beyond it are padding: they
            take no part and get gradient 0. Needs shards of equal size. ``None``: every row is real.
        token_weight_T: [T] weight of each token in the returned sum, e.g. a mask; receives no gradient.
        tokens_per_chunk: Tokens whose logits exist at one time (a row of V each), and which share their collectives.

    Returns:
        Without ``token_weight_T``: [T] loss in nats, float32 (float64 for float64 inputs), equal on all ranks of
        ``group``, right for any upstream gradient. With it: (sum of weight * loss, loss [T] without gradient); a loss of
        weight 0 still enters as 0 * loss.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    _check_layer("student", student_TH, student_head_VH)
    _check_layer("teacher", teacher_TH, teacher_head_VH)
    if student_TH.shape[0] != teacher_TH.shape[0] or student_head_VH.shape[0] != teacher_head_VH.shape[0]:
        raise ValueError(
            f"student hidden {tuple(student_TH.shape)} and head {tuple(student_head_VH.shape)} do not fit teacher hidden "
            f"{tuple(teacher_TH.shape)} and head {tuple(teacher_head_VH.shape)}: both need the same tokens and the same "
            "vocabulary rows; split and pad the teacher's head as the student's"
        )
    group = split_over(group)
    comparison = make_comparison(make_divergence(divergence, beta, alpha, weight), temperature, group)
    num_columns = num_real_columns(student_head_VH.shape[0], group, valid_vocab_size)
    teacher = teacher_TH.detach(), teacher_head_VH.detach()[:num_columns]
    dtype = accumulation_dtype(student_TH.dtype)
    problem = Problem(
        comparison, partial(logit_chunks, *teacher, tokens_per_chunk, dtype), num_columns, tokens_per_chunk
    )
    return solve(student_TH, student_head_VH, problem, token_weight_T)


def linear_cross_entropy(
    student_TH: Tensor,
    student_head_VH: Tensor,
    labels_T: Tensor,
    *,
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
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: See ``linear_distill_loss``.
        token_weight_T: See ``linear_distill_loss``.
        tokens_per_chunk: See ``linear_distill_loss``.

    Returns:
        As ``linear_distill_loss``.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    _check_layer("student", student_TH, student_head_VH)
    if labels_T.shape != student_TH.shape[:1] or labels_T.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels_T.shape)} {labels_T.dtype} do not fit hidden states {tuple(student_TH.shape)}; pass "
            "one int64 token id per row"
        )
    group = split_over(group)
    num_columns = num_real_columns(student_head_VH.shape[0], group, valid_vocab_size)
    first = 0 if group is None else group.rank() * student_head_VH.shape[0]
    labels = partial(label_chunks, labels_T - first, tokens_per_chunk)
    problem = Problem(LabelComparison(group), labels, num_columns, tokens_per_chunk)
    return solve(student_TH, student_head_VH, problem, token_weight_T)


def _check_layer(name: str, hidden_TH: Tensor, head_VH: Tensor) -> None:
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
