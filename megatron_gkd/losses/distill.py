"""Distillation loss of given logits over a split vocabulary.

Shapes: T = tokens, V = vocabulary entries held by this rank, K = numbers per token that the gradient needs.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.losses.comparison import Comparison, make_comparison
from megatron_gkd.losses.divergences import make_divergence
from megatron_gkd.losses.softmax import Group, num_real_columns, row_pieces, split_over


def distill_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    divergence: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    weight: float = 0.5,
    temperature: float = 1.0,
    group: Group = None,
    valid_vocab_size: int | None = None,
) -> Tensor:
    """Per-token divergence between teacher and student.

    Forward and backward allocate no [T, V] besides the gradient itself; the backward has no collective.

    Args:
        student_TV: [T, V] logits of this rank's vocabulary shard, any float dtype. Not modified.
        teacher_TV: [T, V] logits of the same shard; receives no gradient. Both must stay unchanged until the backward.
        divergence: A name in ``DIVERGENCES``; formulas in ``losses.divergences``.
        beta: Weight of the teacher in the mixture of ``jsd``.
        alpha: Weight of the first argument in the mixture of skewed divergences; the present ones have none.
        weight: Weight of forward KL in a mixture of directions; the present divergences have none.
        temperature: Divides both logits; the loss is not multiplied by temperature**2.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Number of real entries of the whole vocabulary. Columns beyond it are padding: they take no
            part and get gradient 0. Needs shards of equal size. ``None``: every column is real.

    Returns:
        [T] loss in nats, float32 (float64 for float64 student logits), equal on all ranks of ``group``.

    Raises:
        ValueError: If shapes do not fit, or the divergence, its parameter, the temperature or the size is invalid.
    """
    if student_TV.dim() != 2 or student_TV.shape != teacher_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits {tuple(teacher_TV.shape)} are not two equal "
            "[tokens, local vocabulary]; flatten the tokens, and pad both vocabularies to the same size with "
            "student.make_vocab_size_divisible_by"
        )
    group = split_over(group)
    comparison = make_comparison(make_divergence(divergence, beta, alpha, weight), temperature, group)
    num_columns = num_real_columns(student_TV.shape[-1], group, valid_vocab_size)
    return _Distill.apply(student_TV, teacher_TV.detach(), comparison, num_columns)


class _Distill(torch.autograd.Function):
    """Saves K numbers per token; the gradient is made in the backward, where any upstream is a factor per row."""

    @staticmethod
    def forward(
        ctx, student_TV: Tensor, teacher_TV: Tensor, comparison: Comparison, num_columns: int
    ) -> Tensor:
        """One block: every collective carries all tokens."""
        x_TV, y_TV = student_TV[:, :num_columns], teacher_TV[:, :num_columns]
        loss_T, stats_TK = comparison.measure(x_TV, y_TV)
        ctx.save_for_backward(student_TV, teacher_TV, stats_TK)
        ctx.comparison, ctx.num_columns = comparison, num_columns
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        """Local: pieces of rows, cast to the student's dtype as they are written."""
        student_TV, teacher_TV, stats_TK = ctx.saved_tensors
        x_TV, y_TV = student_TV[:, : ctx.num_columns], teacher_TV[:, : ctx.num_columns]
        grad_TV = torch.empty_like(student_TV, memory_format=torch.contiguous_format)
        grad_TV[:, ctx.num_columns :] = 0
        for rows in row_pieces(x_TV):
            grad_TV[rows, : ctx.num_columns] = ctx.comparison.gradient(
                x_TV[rows], y_TV[rows], stats_TK[rows], grad_T[rows]
            )
        return grad_TV, None, None, None
