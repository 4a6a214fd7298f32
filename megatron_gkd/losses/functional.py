"""The public functions: ``DistillLoss`` for one call, from logits or from the inputs of the LM heads.

The gradient of hidden states is this rank's partial sum over its part of the vocabulary: the caller puts the region
operation that adds it up over the group (Megatron's copy_to or gather_from_sequence_parallel) before the loss.

Shapes: T = tokens, V = vocabulary entries held by this rank, K = known entries, H = hidden size (the student's and the
teacher's may differ).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Unpack

from torch import Tensor

from megatron_gkd.config.loss import LossOptions, loss_settings
from megatron_gkd.losses.distill import DistillLoss
from megatron_gkd.losses.fused_linear import LMHead, Logits, Source
from megatron_gkd.losses.sparse import KnownEntries
from megatron_gkd.parallel.gathering import Group


def distill_loss(
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    labels_T: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    token_weight_T: Tensor | None = None,
    overwrite_logits: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token divergence between teacher and student.

    Forward and backward allocate no [T, V] besides the gradient itself, and not even that with ``overwrite_logits``; the
    backward has no collective.

    Args:
        student_TV: [T, V] logits of this rank's vocabulary shard, any float dtype. Not modified, unless
            ``overwrite_logits`` is set.
        teacher_TV: [T, V] logits of the same shard; receives no gradient. Both must stay unchanged until the backward.
        labels_T: [T] global id of the token that follows; for ``support="token"``.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Number of real entries of the whole vocabulary. Columns beyond it are padding: they take no
            part and get gradient 0. Needs shards of equal size. ``None``: every column is real.
        token_weight_T: [T] weight of each token in the returned sum; receives no gradient. Needs ``overwrite_logits``.
        overwrite_logits: Make the gradient in the forward pass, in the student's storage, with the teacher's as scratch:
            nobody may read the logits afterwards. Needs ``token_weight_T``. The backward multiplies the gradient by one
            number and can run once.
        options: ``divergence`` and further ``LossOptions``.

    Returns:
        [T] loss in nats, float32 (float64 for float64 student logits), equal on all ranks of ``group``. With
        ``overwrite_logits``: (sum of weight * loss, loss [T] without gradient).

    Raises:
        ValueError: If shapes do not fit, or an option or the size is invalid.
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
    how = {"group": group, "valid_vocab_size": valid_vocab_size}
    return _solve(Logits(student_TV), Logits(teacher_TV), labels_T, token_weight_T, options, **how)


def top_k_distill_loss(
    student_TV: Tensor,
    ids_TK: Tensor,
    log_probs_TK: Tensor,
    *,
    weight_TK: Tensor | None = None,
    group: Group = None,
    valid_vocab_size: int | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """Per-token divergence from a teacher that is known on K entries of each row.

    Args:
        student_TV: [T, V] logits of this rank's vocabulary shard, any float dtype. Not modified. Shards are of equal size.
        ids_TK: [T, K] global token ids, int64, none of them twice in a row; a negative id is no entry, so that rows may
            know different numbers of them.
        log_probs_TK: [T, K] the teacher's log-probabilities of the ids, at its temperature.
        weight_TK: [T, K] of each entry in the sum, for ids that were drawn: 1 / (number of draws * probability of the
            draw), and 1 for those that were not. Needs ``tail="none"``; ids may repeat then. ``None``: 1.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: See ``distill_loss``.
        options: ``divergence``, ``tail`` and further ``LossOptions``.

    Returns:
        [T] loss, as ``distill_loss``.

    Raises:
        ValueError: If shapes do not fit, or an option or the size is invalid.
    """
    teacher = KnownEntries(ids_TK, log_probs_TK, weight_TK)
    how = {"group": group, "valid_vocab_size": valid_vocab_size}
    return _solve(Logits(student_TV), teacher, None, None, options, **how)


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
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token divergence between teacher and student, from the inputs of their LM heads.

    Args:
        student_TH: [T, H] input of the student's LM head, any float dtype.
        student_head_VH: [V, H] this rank's shard of the student's LM head, same dtype.
        teacher_TH: [T, H_teacher] input of the teacher's LM head (after its final norm); receives no gradient.
        teacher_head_VH: [V, H_teacher] the same rows of the teacher's LM head; receives no gradient.
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
        options: ``divergence`` and further ``LossOptions``.

    Returns:
        Without ``token_weight_T``: [T] loss in nats, float32 (float64 for float64 inputs), equal on all ranks of
        ``group``, right for any upstream gradient. With it: (sum of weight * loss, loss [T] without gradient); a token of
        weight 0 adds 0 and has gradient 0, whatever its row holds.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    sizes = {"tokens_per_chunk": tokens_per_chunk, "valid_vocab_size": valid_vocab_size}
    student = LMHead(student_TH, student_head_VH, student_bias_V)
    teacher = LMHead(teacher_TH.detach(), teacher_head_VH, teacher_bias_V, teacher_scale, teacher_soft_cap)
    how = {"sft_weight": sft_weight, "group": group, **sizes}
    return _solve(student, teacher, labels_T, token_weight_T, options, **how)


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
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """``top_k_distill_loss`` from the input of the student's LM head.

    The student's arguments, the sizes and the result are those of ``linear_distill_loss``, the entries and the options
    those of ``top_k_distill_loss``, and so are the errors. Shards are of equal size.
    """
    sizes = {"tokens_per_chunk": tokens_per_chunk, "valid_vocab_size": valid_vocab_size}
    student = LMHead(student_TH, student_head_VH, student_bias_V)
    teacher = KnownEntries(ids_TK, log_probs_TK, weight_TK)
    return _solve(student, teacher, None, token_weight_T, options, group=group, **sizes)


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
    """Per-token cross-entropy -log q(label), from the input of the LM head.

    Args:
        student_TH: [T, H] input of the LM head, any float dtype.
        student_head_VH: [V, H] this rank's shard of the LM head, same dtype. Shards are of equal size.
        labels_T: [T] global token ids, int64, equal on all ranks. The loss of an id that is no real entry is +inf.
        student_bias_V: [V] bias of the logits.
        group: As the rest and the result: see ``linear_distill_loss``.
        valid_vocab_size: Real entries of the whole vocabulary.
        token_weight_T: [T] weights.
        tokens_per_chunk: Tokens whose logits exist at one time.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a parameter is out of range.
    """
    sizes = {"tokens_per_chunk": tokens_per_chunk, "valid_vocab_size": valid_vocab_size}
    student = LMHead(student_TH, student_head_VH, student_bias_V)
    return _solve(student, None, labels_T, token_weight_T, {}, group=group, **sizes)


# typed as a plain function, for pyright does not see that frozen settings have a hash
_without_group: Callable[..., DistillLoss] = lru_cache(DistillLoss)


def _solve(
    student: Source,
    teacher: Any,
    labels_T: Tensor | None,
    token_weight_T: Tensor | None,
    options: LossOptions,
    **how: Any,
) -> Any:
    # kept, unless it would keep a process group alive beyond its end
    make = _without_group if how["group"] is None else DistillLoss
    loss = make(loss_settings(**options), **how)
    if token_weight_T is None:
        return loss.per_token(student, teacher, labels_T)
    result = loss.weighted(student, teacher, labels_T, token_weight_T=token_weight_T)
    return result.total, result.loss_T
