"""Distillation loss of given logits over a split vocabulary.

Shapes: T = tokens, V = vocabulary entries held by this rank, K = numbers per token that the gradient needs.
"""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.losses.combine import Sum, Term
from megatron_gkd.losses.comparison import Joined
from megatron_gkd.losses.objective import Objective, ObjectiveOptions
from megatron_gkd.losses.softmax import Group, first_id, num_real_columns, split_over
from megatron_gkd.losses.sparse import local_entries


def distill_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    labels_T: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    **objective: Unpack[ObjectiveOptions],
) -> Tensor:
    """Per-token divergence between teacher and student.

    Forward and backward allocate no [T, V] besides the gradient itself; the backward has no collective.

    Args:
        student_TV: [T, V] logits of this rank's vocabulary shard, any float dtype. Not modified.
        teacher_TV: [T, V] logits of the same shard; receives no gradient. Both must stay unchanged until the backward.
        labels_T: [T] global id of the token that follows; for ``support="token"``.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Number of real entries of the whole vocabulary. Columns beyond it are padding: they take no
            part and get gradient 0. Needs shards of equal size. ``None``: every column is real.
        objective: ``divergence`` and further fields of ``Objective``.

    Returns:
        [T] loss in nats, float32 (float64 for float64 student logits), equal on all ranks of ``group``.

    Raises:
        ValueError: If shapes do not fit, or a field of the objective or the size is invalid.
    """
    if student_TV.dim() != 2 or student_TV.shape != teacher_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits {tuple(teacher_TV.shape)} are not two equal "
            "[tokens, local vocabulary]; flatten the tokens, and pad both vocabularies to the same size with "
            "student.make_vocab_size_divisible_by"
        )
    group = split_over(group)
    num_columns = num_real_columns(student_TV.shape[-1], group, valid_vocab_size)
    wanted = Objective(**objective)  # pyright: ignore[reportCallIssue]  (it asks for the divergence itself)
    term = Term("divergence", wanted.scale, wanted.against_logits(group))
    target = teacher_TV.detach()[:, :num_columns]
    if wanted.support != "full":
        target = Joined([target, _local_labels(student_TV, labels_T, wanted, group)])
    return _Distill.apply(student_TV, Joined([target]), Sum(group, (term,)), num_columns)


def top_k_distill_loss(
    student_TV: Tensor,
    ids_TK: Tensor,
    log_probs_TK: Tensor,
    *,
    weight_TK: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    **objective: Unpack[ObjectiveOptions],
) -> Tensor:
    """Per-token divergence from a teacher that is known on K entries of each row.

    Args:
        student_TV: [T, V] logits of this rank's vocabulary shard, any float dtype. Not modified. Shards are of equal size.
        ids_TK: [T, K] global token ids, int64, none of them twice in a row; a negative id is no entry, so that rows may
            know different numbers of them.
        log_probs_TK: [T, K] the teacher's log-probabilities of the ids, at the temperature it is to have.
        weight_TK: [T, K] of each entry in the sum, for ids that were drawn: 1 / (number of draws * probability of the
            draw), and 1 for those that were not. Needs ``tail="none"``; ids may repeat then. ``None``: 1.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: See ``distill_loss``.
        objective: ``divergence``, ``tail`` and further fields of ``Objective``.

    Returns:
        As ``distill_loss``.

    Raises:
        ValueError: If shapes do not fit, or a field of the objective or the size is invalid.
    """
    group = split_over(group)
    num_columns = num_real_columns(student_TV.shape[-1], group, valid_vocab_size)
    wanted = Objective(**objective)  # pyright: ignore[reportCallIssue]  (it asks for the divergence itself)
    target = local_entries(
        ids_TK,
        log_probs_TK,
        weight_TK,
        tail=wanted.tail,
        num_tokens=student_TV.shape[0],
        first=first_id(student_TV.shape[-1], group),
    )
    term = Term("divergence", wanted.scale, wanted.against_entries(group))
    return _Distill.apply(student_TV, Joined([target]), Sum(group, (term,)), num_columns)


def _local_labels(student_TV: Tensor, labels_T: Tensor | None, wanted: Objective, group: Group) -> Tensor:
    if labels_T is None:
        if wanted.support == "token":
            raise ValueError("support=token needs labels_T, the token that follows each row")
        return student_TV.new_zeros(student_TV.shape[0], dtype=torch.int64)
    return labels_T - first_id(student_TV.shape[-1], group)


class _Distill(torch.autograd.Function):
    """Saves K numbers per token; the gradient is made in the backward, where any upstream is a factor per row."""

    @staticmethod
    def forward(ctx, student_TV: Tensor, target: Any, comparison: Sum, num_columns: int) -> Tensor:
        """One block: every collective carries all tokens."""
        loss_T, stats_TK = comparison.measure(student_TV[:, :num_columns], target)
        ctx.save_for_backward(student_TV, stats_TK)
        ctx.target, ctx.comparison, ctx.num_columns = target, comparison, num_columns
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        """Local: pieces of rows, cast to the student's dtype as they are written."""
        student_TV, stats_TK = ctx.saved_tensors
        x_TV = student_TV[:, : ctx.num_columns]
        grad_TV = torch.empty_like(student_TV, memory_format=torch.contiguous_format)
        grad_TV[:, ctx.num_columns :] = 0
        ctx.comparison.write_gradient(x_TV, ctx.target, stats_TK, grad_T, grad_TV[:, : ctx.num_columns])
        return grad_TV, None, None, None
