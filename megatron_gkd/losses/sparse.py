"""Losses against a teacher that is known on a few entries of each row only; a label is the case of one sure entry.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = known entries, B = K + 1 buckets, R = ranks.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.divergences import Divergence, Separable
from megatron_gkd.losses.token_loss import TokenLoss
from megatron_gkd.losses.vocab_parallel import (
    SoftmaxStats,
    accumulation_dtype,
    exp_,
    local_max,
    nan_if_not_positive,
    numbers_per_row,
    row_pieces,
    shifted,
)
from megatron_gkd.parallel.gathering import Rounds

MIN_TAIL_MASS = 1e-7
"""Least mass of the teacher's tail: log-probabilities in float32 cannot tell less from 0."""

NEGATIVE_LOG_LIKELIHOOD = Separable(lambda log_p, log_q: (-log_q, torch.full_like(log_q, -1.0)))
"""-log q of an entry whose probability is 1: the cross-entropy of a label."""


class SparseTarget(NamedTuple):
    """What is known of the teacher in each row; rows may know different numbers of entries.

    Attributes:
        columns_TK: [T, K] int64, counted from this rank's first column; outside [0, V) on every rank but the owner. An
            entry that no rank owns, with log-probability -inf, takes no part.
        log_probs_TK: [T, K] the teacher's log-probabilities.
        weight_TK: [T, K] weight of each entry in the sum; ``None``: 1.
        tail_log_prob_T1: [T, 1] of all other entries together; ``None``: what the known ones leave.
    """

    columns_TK: Tensor
    log_probs_TK: Tensor
    weight_TK: Tensor | None = None
    tail_log_prob_T1: Tensor | None = None


class KnownEntries(NamedTuple):
    """Entries that a teacher sent: global ids [T, K], their log-probabilities and, for draws, their weights.

    A negative id is no entry.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor
    weight_TK: Tensor | None = None

    def target(self, *, tail: str, num_tokens: int, first_id: int) -> SparseTarget:
        """The target of a shard that starts with ``first_id``, for a student with ``num_tokens`` rows.

        Raises:
            ValueError: If shapes or dtypes do not fit, or weights have no meaning for this ``tail``.
        """
        ids_TK, log_probs_TK, weight_TK = self
        if ids_TK.dtype != torch.int64 or ids_TK.dim() != 2 or ids_TK.shape != log_probs_TK.shape:
            raise ValueError(
                f"ids {tuple(ids_TK.shape)} {ids_TK.dtype} and log-probabilities {tuple(log_probs_TK.shape)} are not two "
                "equal [tokens, entries] with int64 ids; fill shorter rows up with id -1"
            )
        if ids_TK.shape[0] != num_tokens or (weight_TK is not None and weight_TK.shape != ids_TK.shape):
            weights = "no weights" if weight_TK is None else f"weights {tuple(weight_TK.shape)}"
            raise ValueError(
                f"ids {tuple(ids_TK.shape)} and {weights} do not fit {num_tokens} tokens of the student; pass one row per token"
            )
        if weight_TK is not None and tail != "none":
            raise ValueError(
                f"weights need tail=none, got {tail}; a weighted sum already stands for all entries"
            )
        is_absent_TK = ids_TK < 0
        log_probs_TK = log_probs_TK.detach().masked_fill(is_absent_TK, -torch.inf)
        columns_TK = torch.where(is_absent_TK, -1, ids_TK - first_id)
        return SparseTarget(columns_TK, log_probs_TK, None if weight_TK is None else weight_TK.detach())


def label_target(columns_T: Tensor) -> SparseTarget:
    """One sure entry per row, for ``NEGATIVE_LOG_LIKELIHOOD``; a label that no rank owns has loss +inf."""
    columns_T1 = columns_T.unsqueeze(-1)
    sure = torch.zeros((), device=columns_T.device)
    return SparseTarget(columns_T1, sure.expand(columns_T1.shape))


class BucketStats(NamedTuple):
    """What the gradient of ``BucketLoss`` needs: of each bucket g = r - q E, and the student's tail."""

    gradient_TB: Tensor
    tail_max_T: Tensor
    tail_sumexp_T: Tensor
    retained_mass_T: Tensor  # sum_k p_k


@dataclass(frozen=True)
class BucketLoss(TokenLoss):
    """Any divergence of two distributions over K + 1 buckets: the known entries, and all others together.

    The teacher's tail has 1 - sum_k p_k, the student's is summed exactly (never 1 - sum_k q_k, which cancels). With
    ``renormalize`` the tail is left out and both are distributions over the known entries. One all-gather of K + 2
    numbers per token: the student's logits of the known entries, and max and sum of exp over its tail.

    d D / d x_j is the bucket's g_k for a known entry, and g_tail q_j / q_tail for any other. saved: ``BucketStats``.
    """

    divergence: Divergence
    temperature: float
    renormalize: bool = False
    metric_names = ("retained_mass",)

    @override
    def rounds(self, student_TV: Tensor, target: SparseTarget) -> Rounds:
        log_q_TB, tail = yield from bucket_round(
            student_TV, target.columns_TK, self.temperature, has_tail=not self.renormalize
        )
        log_p_TB = self._log_p(target, is_tail_empty_T=tail.sumexp_T == 0).to(log_q_TB.dtype)
        value_TB, r_TB = self.divergence(log_p_TB, log_q_TB)
        # NaN for a NaN that ``times`` drops, or that ``renormalize`` leaves outside
        poison_T = 0.0 * (log_q_TB.amax(-1) + tail.sumexp_T + log_p_TB.exp().sum(-1))
        grad_TB = r_TB - log_q_TB.exp() * r_TB.sum(-1, keepdim=True) + poison_T.unsqueeze(-1)
        mass_T = target.log_probs_TK.exp().sum(-1, dtype=log_q_TB.dtype)
        return value_TB.sum(-1) + poison_T, BucketStats(grad_TB, *tail, mass_T)

    @override
    def gradient(
        self, student_TV: Tensor, target: SparseTarget, saved: BucketStats, upstream_T: Tensor
    ) -> Tensor:
        scale_T1 = upstream_T.unsqueeze(-1) / self.temperature
        max_T1, sum_T1 = saved.tail_max_T.unsqueeze(-1), saved.tail_sumexp_T.unsqueeze(-1)
        out = _with_spare_column(student_TV, target.columns_TK, -torch.inf)
        exp_(out.sub_(max_T1).div_(self.temperature))
        out.mul_(torch.where(sum_T1 == 0, 0.0, saved.gradient_TB[:, -1:] / sum_T1) * scale_T1)
        out.scatter_(
            -1, _spare_if_foreign(target.columns_TK, student_TV), saved.gradient_TB[:, :-1] * scale_T1
        )
        return out[:, :-1]

    @override
    def metrics(self, saved: BucketStats) -> tuple[Tensor, ...]:
        return (saved.retained_mass_T,)

    def _log_p(self, target: SparseTarget, is_tail_empty_T: Tensor) -> Tensor:
        known_TK = target.log_probs_TK.double()
        if self.renormalize:
            return torch.nn.functional.pad(known_TK.log_softmax(-1), (0, 1), value=-torch.inf)
        if target.tail_log_prob_T1 is not None:
            return torch.cat([known_TK, target.tail_log_prob_T1], -1)
        tail_T = (1 - known_TK.exp().sum(-1)).clamp_min(MIN_TAIL_MASS).log()
        tail_T = torch.where(is_tail_empty_T, -torch.inf, tail_T)
        return torch.cat([known_TK, tail_T.unsqueeze(-1)], -1)


class PartialStats(NamedTuple):
    """What the gradient of ``PartialSumLoss`` needs: w r of the known entries and the normalizer; and its metrics."""

    r_TK: Tensor
    max_T: Tensor
    sumexp_T: Tensor
    retained_mass_T: Tensor  # sum_k p_k
    variance_T: Tensor  # of the sum over draws, estimated from their scatter


@dataclass(frozen=True)
class PartialSumLoss(TokenLoss):
    """sum_k w_k f(log p_k, log q_k) over the known entries, q over the whole vocabulary; w = 1 without weights.

    Without weights this is what several systems call a top-k divergence: no bound, for the mass outside counts nothing.
    With weights 1 / (number of draws * probability of the draw) it is an unbiased estimate of the whole sum: with
    ``num_exact`` the divergence keeps its offset, whose mean is 0, so that equal models have loss and gradient 0. With
    an estimator in place of f, K = 1 and the sampled token, it is k1, k2 or k3; with ``NEGATIVE_LOG_LIKELIHOOD`` and a
    label the cross-entropy. Entries may repeat.

    One all-gather of K + 2 numbers per token. d / d x_j = sum_k w_k r_k [id_k = j] - q_j sum_k w_k r_k. saved:
    ``PartialStats``.

    Attributes:
        num_exact: Leading entries that are no draws.
        has_metrics: Whether the entries are a part of a distribution, and not one token.
    """

    divergence: Divergence
    temperature: float
    num_exact: int | None = None
    has_metrics: bool = True

    @override
    def rounds(self, student_TV: Tensor, target: SparseTarget) -> Rounds:
        log_q_TK, stats = yield from log_prob_round(student_TV, target.columns_TK, self.temperature)
        log_p_TK = target.log_probs_TK.to(log_q_TK.dtype)
        value_TK, r_TK = self._entries(log_p_TK, log_q_TK, target.weight_TK)
        mass_T = log_p_TK.exp().sum(-1)
        poison_T = nan_if_not_positive(stats.sumexp_T) + 0.0 * mass_T  # for a NaN that ``times`` drops
        saved = PartialStats(r_TK + poison_T.unsqueeze(-1), *stats, mass_T, self._variance(value_TK))
        return value_TK.sum(-1) + poison_T, saved

    @override
    def gradient(
        self, student_TV: Tensor, target: SparseTarget, saved: PartialStats, upstream_T: Tensor
    ) -> Tensor:
        scale_T1 = upstream_T.unsqueeze(-1) / self.temperature
        factor_T1 = -saved.r_TK.sum(-1, keepdim=True) * scale_T1 / saved.sumexp_T.unsqueeze(-1)
        out_TV = exp_(shifted(student_TV, saved.max_T.unsqueeze(-1), self.temperature)).mul_(factor_T1)
        if student_TV.shape[-1] > 0:
            column_TK, is_owned_TK = _owned(target.columns_TK, student_TV)
            out_TV.scatter_add_(-1, column_TK, torch.where(is_owned_TK, saved.r_TK * scale_T1, 0.0))
        return out_TV

    @property
    @override
    def metric_names(self) -> tuple[str, ...]:
        if not self.has_metrics:
            return ()
        return ("retained_mass",) if self.num_exact is None else ("variance",)

    @override
    def metrics(self, saved: PartialStats) -> tuple[Tensor, ...]:
        return tuple(getattr(saved, f"{name}_T") for name in self.metric_names)

    def _entries(self, log_p_TK: Tensor, log_q_TK: Tensor, weight_TK: Tensor | None) -> tuple[Tensor, Tensor]:
        value_TK, r_TK = self.divergence(log_p_TK, log_q_TK)
        if self.divergence.offset and self.num_exact is None:  # it sums to 0 over the whole vocabulary only
            q_TK = log_q_TK.exp()
            value_TK = value_TK - self.divergence.offset * (q_TK - log_p_TK.exp())
            r_TK = r_TK - self.divergence.offset * q_TK
        if weight_TK is not None:
            value_TK, r_TK = value_TK * weight_TK, r_TK * weight_TK
        is_absent_TK = (log_p_TK == -torch.inf) & (log_q_TK == -torch.inf)
        return value_TK.masked_fill(is_absent_TK, 0.0), r_TK.masked_fill(is_absent_TK, 0.0)

    def _variance(self, value_TK: Tensor) -> Tensor:
        num_exact = value_TK.shape[-1] if self.num_exact is None else self.num_exact
        num_draws = value_TK.shape[-1] - num_exact
        if num_draws < 2:
            return value_TK.new_zeros(value_TK.shape[0])
        return num_draws * value_TK[:, num_exact:].var(-1)


def log_prob_round(
    logits_TV: Tensor, columns_TK: Tensor, temperature: float
) -> Generator[Tensor, Tensor, tuple[Tensor, SoftmaxStats]]:
    """([T, K] log-probabilities of the entries, normalizer of the whole vocabulary), by one all-gather of K + 2 numbers."""
    known_TK, stats = yield from _entry_round(logits_TV, columns_TK, temperature, of_rest=False)
    log_prob_TK = shifted(known_TK, stats.max_T.unsqueeze(-1), temperature)
    return log_prob_TK.sub_(stats.sumexp_T.log().unsqueeze(-1)), stats


def bucket_round(
    logits_TV: Tensor, columns_TK: Tensor, temperature: float, *, has_tail: bool = True
) -> Generator[Tensor, Tensor, tuple[Tensor, SoftmaxStats]]:
    """([T, K + 1] log-probabilities of the entries and of all others together, normalizer of the others).

    By one all-gather of K + 2 numbers per token. Without a tail, the others have probability 0.
    """
    known_TK, tail = yield from _entry_round(logits_TV, columns_TK, temperature, of_rest=True)
    max_T1 = torch.maximum(known_TK.amax(-1), tail.max_T).unsqueeze(-1)
    tail_T1 = (tail.max_T.unsqueeze(-1) - max_T1) / temperature + tail.sumexp_T.log().unsqueeze(-1)
    if not has_tail:
        tail_T1 = torch.full_like(tail_T1, -torch.inf)
    return torch.cat([(known_TK - max_T1) / temperature, tail_T1], -1).log_softmax(-1), tail


def _entry_round(
    logits_TV: Tensor, columns_TK: Tensor, temperature: float, *, of_rest: bool
) -> Generator[Tensor, Tensor, tuple[Tensor, SoftmaxStats]]:
    """([T, K] logits of the entries, normalizer of the whole vocabulary or of all other entries)."""
    packed_TK = numbers_per_row(logits_TV, columns_TK.shape[-1] + 2)
    for rows in row_pieces(logits_TV):
        x_TV = logits_TV[rows]
        known_TK = _gathered(x_TV, columns_TK[rows]).to(packed_TK.dtype)
        if of_rest:
            x_TV = _with_spare_column(x_TV, columns_TK[rows], -torch.inf)[:, :-1]
        max_T1 = local_max(x_TV).to(packed_TK.dtype).unsqueeze(-1)
        sum_T1 = exp_(shifted(x_TV, max_T1, temperature)).sum(-1, keepdim=True)
        packed_TK[rows] = torch.cat([known_TK, max_T1, sum_T1], -1)
    packed_RTK = yield packed_TK
    stats = SoftmaxStats.merged(packed_RTK[..., -2], packed_RTK[..., -1], temperature)
    return packed_RTK[..., :-2].amax(0), stats


def _gathered(logits_TV: Tensor, columns_TK: Tensor) -> Tensor:
    """[T, K] logits of the entries that this rank owns, -inf for others."""
    if logits_TV.shape[-1] == 0:
        return logits_TV.new_full(columns_TK.shape, -torch.inf)
    column_TK, is_owned_TK = _owned(columns_TK, logits_TV)
    return logits_TV.gather(-1, column_TK).where(is_owned_TK, -torch.inf)


def _owned(columns_TK: Tensor, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(columns, 0 in place of those of other ranks; whether this rank owns them)."""
    is_owned_TK = (columns_TK >= 0) & (columns_TK < logits_TV.shape[-1])
    return torch.where(is_owned_TK, columns_TK, 0), is_owned_TK


def _with_spare_column(logits_TV: Tensor, columns_TK: Tensor, value: float) -> Tensor:
    """A copy [T, V + 1] in the accumulation dtype with ``value`` at the entries; the last column is for other ranks'."""
    num_rows, num_columns = logits_TV.shape
    copy = logits_TV.new_empty(num_rows, num_columns + 1, dtype=accumulation_dtype(logits_TV.dtype))
    copy[:, :-1] = logits_TV
    return copy.scatter_(-1, _spare_if_foreign(columns_TK, logits_TV), value)


def _spare_if_foreign(columns_TK: Tensor, logits_TV: Tensor) -> Tensor:
    """Columns, the spare one after the last for entries of other ranks: a placeholder must not hit a real column."""
    num_columns = logits_TV.shape[-1]
    return torch.where((columns_TK >= 0) & (columns_TK < num_columns), columns_TK, num_columns)
