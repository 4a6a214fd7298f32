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
from megatron_gkd.losses.softmax import Group, accumulation_dtype, first_id, num_real_columns, split_over
from megatron_gkd.losses.sparse import local_entries


def distill_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    labels_T: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    token_weight_T: Tensor | None = None,
    overwrite_logits: bool = False,
    **objective: Unpack[ObjectiveOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token divergence between teacher and student.

    Forward and backward allocate no [T, V] besides the gradient itself, and not even that with ``overwrite_logits``; the
    backward has no collective.

    Args:
        student_TV: [T, V] logits of this rank's vocabulary shard, any float dtype. Not modified, unless
            ``overwrite_logits`` says so.
        teacher_TV: [T, V] logits of the same shard; receives no gradient. Both must stay unchanged until the backward.
        labels_T: [T] global id of the token that follows; for ``support="token"``.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Number of real entries of the whole vocabulary. Columns beyond it are padding: they take no
            part and get gradient 0. Needs shards of equal size. ``None``: every column is real.
        token_weight_T: [T] weight of each token in the returned sum; receives no gradient. Needs ``overwrite_logits``.
        overwrite_logits: Make the gradient in the forward pass, in the student's storage, with the teacher's as scratch:
            nobody may read the logits afterwards. Needs ``token_weight_T``. The backward multiplies the gradient by one
            number and can run once.
        objective: ``divergence`` and further fields of ``Objective``.

    Returns:
        [T] loss in nats, float32 (float64 for float64 student logits), equal on all ranks of ``group``. With
        ``overwrite_logits``: (sum of weight * loss, loss [T] without gradient).

    Raises:
        ValueError: If shapes do not fit, or a field of the objective or the size is invalid.
    """
    if student_TV.dim() != 2 or student_TV.shape != teacher_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits {tuple(teacher_TV.shape)} are not two equal "
            "[tokens, local vocabulary]; flatten the tokens, and pad both vocabularies to the same size with "
            "student.make_vocab_size_divisible_by"
        )
    if overwrite_logits != (token_weight_T is not None):
        raise ValueError(
            "overwrite_logits=True and token_weight_T go together: a gradient that is made in the forward needs the weights, "
            "and with weights it is made there; pass both or neither"
        )
    group = split_over(group)
    num_columns = num_real_columns(student_TV.shape[-1], group, valid_vocab_size)
    wanted = Objective(**objective)  # pyright: ignore[reportCallIssue]  (it asks for the divergence itself)
    term = Term("divergence", wanted.scale, wanted.against_logits(group))
    target = teacher_TV.detach()[:, :num_columns]
    if wanted.support != "full":
        target = Joined([target, _local_labels(student_TV, labels_T, wanted, group)])
    problem = Joined([target]), Sum(group, (term,)), num_columns
    if token_weight_T is None:
        return _Distill.apply(student_TV, *problem)
    return _overwrite(student_TV, token_weight_T, *problem)


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
    term = Term("divergence", wanted.scale, wanted.against_entries(group, ids_TK.shape[1]))
    return _Distill.apply(student_TV, Joined([target]), Sum(group, (term,)), num_columns)


def _local_labels(student_TV: Tensor, labels_T: Tensor | None, wanted: Objective, group: Group) -> Tensor:
    if labels_T is None:
        if wanted.support == "token":
            raise ValueError("support=token needs labels_T, the token that follows each row")
        return student_TV.new_zeros(student_TV.shape[0], dtype=torch.int64)
    return labels_T - first_id(student_TV.shape[-1], group)


def _overwrite(
    student_TV: Tensor, token_weight_T: Tensor, target: Joined, comparison: Sum, num_columns: int
) -> tuple[Tensor, Tensor]:
    """(weighted sum, loss_T); the logits are left alone where no gradient is asked for."""
    if token_weight_T.shape != student_TV.shape[:1]:
        raise ValueError(
            f"token_weight_T {tuple(token_weight_T.shape)} does not fit logits {tuple(student_TV.shape)}; pass one weight "
            "per row"
        )
    weight_T = token_weight_T.detach().to(accumulation_dtype(student_TV.dtype))
    if torch.is_grad_enabled() and student_TV.requires_grad:
        return _OverwritingDistill.apply(student_TV, weight_T, target, comparison, num_columns)
    loss_T, _ = comparison.measure(student_TV.detach()[:, :num_columns], target)
    return (loss_T * weight_T).sum(), loss_T


class _OverwritingDistill(torch.autograd.Function):
    """The weighted sum; its gradient is made in the forward, in the storage of the logits."""

    @staticmethod
    def forward(
        ctx, student_TV: Tensor, weight_T: Tensor, target: Any, comparison: Sum, num_columns: int
    ) -> tuple[Tensor, Tensor]:
        """One block: every collective carries all tokens."""
        grad_TV = (
            student_TV.detach()
        )  # counts changes together with the logits: autograd sees that they are gone
        loss_T, _ = comparison.differentiate_(grad_TV[:, :num_columns], target, weight_T)
        grad_TV[:, num_columns:] = 0
        ctx.save_for_backward(grad_TV)
        ctx.mark_non_differentiable(loss_T)
        return (loss_T * weight_T).sum(), loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """One number for all tokens, on a CPU without a pass where it is 1."""
        (grad_TV,) = ctx.saved_tensors
        if grad_TV.device.type != "cpu" or upstream != 1:
            grad_TV.mul_(upstream)
        return grad_TV, None, None, None, None


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
