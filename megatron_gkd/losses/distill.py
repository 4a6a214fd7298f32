"""The loss of a run: built once from its settings, called for every micro-batch.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.config.loss import LossSettings
from megatron_gkd.losses.dense import make_dense_loss
from megatron_gkd.losses.divergences import AdaptiveKL, make_divergence, make_estimator
from megatron_gkd.losses.fused_linear import ChunkedLoss, HeadGradient, LMHead, Logits, Source, WeightedLoss
from megatron_gkd.losses.sparse import (
    NEGATIVE_LOG_LIKELIHOOD,
    BucketLoss,
    KnownEntries,
    PartialSumLoss,
    label_target,
)
from megatron_gkd.losses.supports import HeadAndDraws, SampledToken, SupportLoss, SupportTarget, TopK
from megatron_gkd.losses.token_loss import LimitedLoss, Term, TermSum, TokenLoss
from megatron_gkd.losses.vocab_parallel import Temperatures, accumulation_dtype, first_id, num_real_columns
from megatron_gkd.parallel.gathering import Group, split_over

Teacher = LMHead | Logits | KnownEntries | None
"""Head with hidden states, logits, entries that were sent, or no teacher."""

_LOGITS_PER_CHUNK = 2**24
"""64 MiB in float32."""


class DistillLoss:
    """A divergence from the teacher, the cross-entropy of the labels, or a mix of both.

    Args:
        settings: The divergence and how it is computed.
        sft_weight: Share of the cross-entropy, which no temperature touches: (1 - sft_weight) divergence + sft_weight
            cross-entropy, both from the same student logits.
        tokens_per_chunk: Tokens whose logits exist at one time, and which share their collectives; ``None``: see
            ``choose_tokens_per_chunk``.
        group: Tensor-parallel group, or ``None`` if the vocabulary is not split.
        valid_vocab_size: Real entries of the whole vocabulary; further rows of the heads are padding, take no part and
            get gradient 0. Needs shards of equal size. ``None``: every row is real.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        sft_weight: float = 0.0,
        tokens_per_chunk: int | None = None,
        group: Group = None,
        valid_vocab_size: int | None = None,
    ):
        if not 0.0 <= sft_weight <= 1.0:
            raise ValueError(
                f"sft_weight {sft_weight} needs labels_T and lies in [0, 1]; it is the share of the cross-entropy"
            )
        if tokens_per_chunk is not None and tokens_per_chunk < 1:
            raise ValueError(f"tokens_per_chunk {tokens_per_chunk} is not at least 1; 256 suits most shapes")
        self.settings, self.sft_weight = settings, sft_weight
        self._scale = settings.temperature**2 if settings.temperature_squared else 1.0
        self.group = split_over(group)
        self._tokens_per_chunk, self._valid_vocab_size = tokens_per_chunk, valid_vocab_size
        self._losses: dict[bool, TokenLoss] = {}

    def weighted(
        self,
        student: Source,
        teacher: Teacher,
        labels_T: Tensor | None = None,
        *,
        token_weight_T: Tensor | None = None,
        add_head_gradient: HeadGradient | None = None,
    ) -> WeightedLoss:
        """Sum of weight * loss over the tokens, with gradients that are made in the forward pass.

        Args:
            student: Its head with hidden states [T, H]; or its logits, which are overwritten where they need a gradient.
            teacher: Same tokens and same vocabulary rows; receives no gradient.
            labels_T: [T] int64 global id of the token that follows; for the cross-entropy and ``support=token``.
            token_weight_T: [T] weight of each token; one of weight 0 adds 0 and has gradient 0 whatever its row holds.
                ``None``: 1.
            add_head_gradient: Called in the backward pass in place of handing the head's gradient to autograd.

        Raises:
            ValueError: If shapes or dtypes do not fit, or the settings need another teacher.
        """
        chunked = self._chunked(student, teacher, labels_T)
        first = student[0]
        if token_weight_T is not None:
            if token_weight_T.shape != first.shape[:1]:
                name = "logits" if isinstance(student, Logits) else "hidden states"
                raise ValueError(
                    f"token_weight_T {tuple(token_weight_T.shape)} does not fit {name} {tuple(first.shape)}; pass one weight "
                    "per row"
                )
            token_weight_T = token_weight_T.detach().to(accumulation_dtype(first.dtype))
        return chunked.weighted(student, token_weight_T, add_head_gradient)

    def per_token(self, student: Source, teacher: Teacher, labels_T: Tensor | None = None) -> Tensor:
        """[T] loss in nats, right for any upstream gradient; arguments and errors as ``weighted``."""
        return self._chunked(student, teacher, labels_T).per_token(student)

    def _chunked(self, student: Source, teacher: Teacher, labels_T: Tensor | None) -> ChunkedLoss:
        first, weight_VH, _ = student[:3]
        num_local = first.shape[1] if weight_VH is None else weight_VH.shape[0]
        _check_heads(student, teacher, num_local)
        columns_T = None if labels_T is None else self._columns(labels_T, first, num_local)
        terms, targets = [], []
        if teacher is not None and self.sft_weight < 1:
            is_known = isinstance(teacher, KnownEntries)
            if is_known not in self._losses:
                self._losses[is_known] = _divergence_loss(self.settings, is_known, self.group)
            terms.append(Term("divergence", (1 - self.sft_weight) * self._scale, self._losses[is_known]))
            targets.append(self._divergence_target(teacher, first, num_local, columns_T))
        if teacher is None or self.sft_weight > 0:
            if columns_T is None:
                raise ValueError(
                    f"sft_weight {self.sft_weight} needs labels_T, the token that follows each row"
                )
            loss = PartialSumLoss(self.group, NEGATIVE_LOG_LIKELIHOOD, 1.0, has_metrics=False)
            terms.append(Term("cross_entropy", self.sft_weight if teacher is not None else 1.0, loss))
            targets.append(label_target(columns_T))
        num_columns = num_real_columns(num_local, self.group, self._valid_vocab_size)
        tokens_per_chunk = self._tokens_per_chunk or choose_tokens_per_chunk(num_local)
        if len(terms) == 1 and terms[0].weight == 1.0:
            return ChunkedLoss(terms[0].loss, targets[0], num_columns, tokens_per_chunk, terms[0].name)
        return ChunkedLoss(TermSum(self.group, tuple(terms)), tuple(targets), num_columns, tokens_per_chunk)

    def _columns(self, labels_T: Tensor, first: Tensor, num_local: int) -> Tensor:
        """[T] labels, counted from this rank's first column."""
        if labels_T.shape != first.shape[:1] or labels_T.dtype != torch.int64:
            raise ValueError(
                f"labels {tuple(labels_T.shape)} {labels_T.dtype} do not fit hidden states or logits {tuple(first.shape)}; "
                "pass one int64 token id per row"
            )
        first_column = first_id(num_local, self.group)
        return labels_T - first_column if first_column else labels_T

    def _divergence_target(
        self, teacher: Any, first: Tensor, num_local: int, columns_T: Tensor | None
    ) -> Any:
        settings, num_tokens = self.settings, first.shape[0]
        if isinstance(teacher, KnownEntries):
            if settings.support == "token" and teacher.ids_TK.shape[1] != 1:
                raise ValueError(
                    f"support=token takes 1 entry per row, the token that follows, but {teacher.ids_TK.shape[1]} are given; "
                    "pass ids and log-probabilities [tokens, 1], or set support=teacher_top_k"
                )
            first_column = first_id(num_local, self.group)
            return teacher.target(tail=settings.tail, num_tokens=num_tokens, first_id=first_column)
        if isinstance(teacher, Logits):
            num_columns = num_real_columns(num_local, self.group, self._valid_vocab_size)
            teacher = teacher.logits_TV.detach()[:, :num_columns]
        if settings.support == "full":
            return teacher
        if columns_T is None:
            if settings.support == "token":
                raise ValueError("support=token needs labels_T, the token that follows each row")
            columns_T = torch.zeros(num_tokens, dtype=torch.int64, device=first.device)
        return SupportTarget(teacher, columns_T)


@cache
def choose_tokens_per_chunk(num_columns: int) -> int:
    """64 MiB of fp32 logits for this many columns, clamped to [256, 2048] tokens."""
    return min(max(_LOGITS_PER_CHUNK // max(num_columns, 1), 256), 2048)


def _divergence_loss(settings: LossSettings, is_known: bool, group: Group) -> TokenLoss:
    """The loss of a token; ``is_known``: the teacher sent its entries, instead of logits."""
    teacher_tau = settings.teacher_temperature
    temperatures = Temperatures(settings.temperature, teacher_tau or settings.temperature)
    # all settings: a divergence takes those that its factory names
    parameters = settings.model_dump(exclude={"divergence"})
    divergence = make_divergence(settings.divergence, **parameters)
    if settings.support == "full" and not is_known:
        loss = make_dense_loss(divergence, temperatures, group, settings.backend, settings.rows_per_pass)
    else:
        if isinstance(divergence, AdaptiveKL):
            raise ValueError(
                "adaptive_kl weighs the teacher's whole distribution; it needs support=full and a teacher with logits"
            )
        loss = _sparse_loss(settings, divergence, temperatures, is_known, group)
    return loss if settings.max_token_loss is None else LimitedLoss(group, loss, settings.max_token_loss)


def _sparse_loss(
    settings: LossSettings, divergence: Any, temperatures: Temperatures, is_known: bool, group: Group
) -> TokenLoss:
    """The loss on the entries of a support, which a teacher sent or which are chosen from its logits."""
    support, tau = settings.support, temperatures.student
    if is_known and support not in ("full", "teacher_top_k", "token"):
        raise ValueError(
            f"support={support} chooses entries from a teacher's logits, but the entries are given; set "
            "support=teacher_top_k, or pass the teacher's logits to distill_loss or linear_distill_loss"
        )
    if support == "token":
        estimator = make_estimator(settings.estimator, policy_gradient=settings.policy_gradient)
        chooser, inner = SampledToken(), PartialSumLoss(group, estimator, tau, has_metrics=False)
    elif support == "sampled":
        chooser = HeadAndDraws(settings.top_k, settings.num_draws, temperatures)
        inner = PartialSumLoss(group, divergence, tau, num_exact=settings.top_k)
    else:
        of_teacher, of_student = support != "student_top_k", support in ("student_top_k", "union")
        chooser = TopK(settings.top_k, of_teacher=of_teacher, of_student=of_student)
        if settings.tail == "none":
            inner = PartialSumLoss(group, divergence, tau)
        else:
            inner = BucketLoss(group, divergence, tau, renormalize=settings.tail == "renormalize")
    return inner if is_known else SupportLoss(group, chooser, inner, temperatures.teacher)


def _check_heads(student: Source, teacher: Teacher, num_local: int) -> None:
    heads = {"student": student, "teacher": teacher}
    for name, head in heads.items():
        if not isinstance(head, LMHead):
            continue
        hidden_TH, weight_VH, bias_V = head[:3]
        if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
            raise ValueError(
                f"{name} hidden states {tuple(hidden_TH.shape)} and head {tuple(weight_VH.shape)} are not [tokens, hidden] "
                "and [local vocabulary, hidden]; flatten the tokens, and pass the weight of the output layer as it is"
            )
        if hidden_TH.dtype != weight_VH.dtype:
            raise ValueError(
                f"{name} hidden states are {hidden_TH.dtype} but its head is {weight_VH.dtype}; cast one of them, the product "
                "is made in their common dtype"
            )
        if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
            raise ValueError(
                f"{name} bias {tuple(bias_V.shape)} does not fit its head {tuple(weight_VH.shape)}; pass one number per row"
            )
    if isinstance(teacher, LMHead) and (student[0].shape[0], num_local) != (
        teacher.hidden_TH.shape[0],
        teacher.weight_VH.shape[0],
    ):
        raise ValueError(
            f"student hidden {tuple(student[0].shape)} and head of {num_local} rows do not fit teacher hidden "
            f"{tuple(teacher.hidden_TH.shape)} and head {tuple(teacher.weight_VH.shape)}: both need the same tokens and the "
            "same vocabulary rows; split and pad the teacher's head as the student's"
        )
