"""Divergences from a teacher that is known on a few entries of each row only.

A target is ``Joined([ids_TK, log_probs_TK])``, with the weights [T, K] of the entries as a third part where they have some,
and the log-probability [T, 1] of the teacher's tail as a fourth where it is known better than as what the others leave. Ids
count from this rank's first column; an id outside [0, V) belongs to another rank. Rows may know different numbers of
entries: an id that no rank owns with log-probability -inf takes no part.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = known entries, B = K + 1 buckets, R = ranks.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_gkd.losses.comparison import Comparison, Joined, Rounds
from megatron_gkd.losses.divergences import Divergence
from megatron_gkd.losses.elementwise import exp_
from megatron_gkd.losses.softmax import (
    SoftmaxStats,
    accumulation_dtype,
    local_max,
    numbers_per_row,
    row_pieces,
    shifted,
)

Tail = Literal["bucket", "renormalize", "none"]

MIN_TAIL_MASS = 1e-7
"""Least mass of the teacher's tail: log-probabilities in float32 cannot tell less from 0."""


def local_entries(
    ids_TK: Tensor,
    log_probs_TK: Tensor,
    weight_TK: Tensor | None,
    *,
    tail: Tail,
    num_tokens: int,
    first: int,
) -> Joined:
    """The target for global ids, of which a negative one is no entry.

    Args:
        ids_TK: Global ids.
        log_probs_TK: The teacher's.
        weight_TK: Of drawn entries.
        tail: What becomes of the others.
        num_tokens: T of the student.
        first: Id of this rank's first column.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
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
        raise ValueError(f"weights need tail=none, got {tail}; a weighted sum already stands for all entries")
    is_absent_TK = ids_TK < 0
    log_probs_TK = log_probs_TK.detach().masked_fill(is_absent_TK, -torch.inf)
    local_TK = torch.where(is_absent_TK, -1, ids_TK - first)
    return Joined([local_TK, log_probs_TK] + ([] if weight_TK is None else [weight_TK.detach()]))


@dataclass(frozen=True)
class Buckets(Comparison):
    """Any divergence of two distributions over K + 1 buckets: the known entries, and all others together.

    The teacher's tail has 1 - sum_k p_k, the student's is summed exactly (never 1 - sum_k q_k, which cancels). With
    ``renormalize`` the tail is left out and both are distributions over the known entries. One all-gather of K + 2
    numbers per token: the student's logits of the known entries, and max and sum of exp over its tail.

    d D / d x_j is the bucket's gradient g_k = r_k - q_k E for a known entry, and g_tail q_j / q_tail for any other.
    """

    divergence: Divergence
    temperature: float
    renormalize: bool = False

    def rounds(self, student_TV: Tensor, target: Joined) -> Rounds:
        """See ``Comparison``; stats = g of the K + 1 buckets, max and sum of exp of the student's tail, sum_k p_k."""
        ids_TK, log_probs_TK = target[:2]
        log_q_TB, tail = yield from bucket_round(
            student_TV, ids_TK, self.temperature, has_tail=not self.renormalize
        )
        log_p_TB = self._log_p(target, is_tail_empty_T=tail.sumexp_T == 0).to(log_q_TB.dtype)
        value_TB, r_TB = self.divergence(log_p_TB, log_q_TB)
        # NaN for a NaN that ``times`` drops, or that ``renormalize`` leaves outside
        poison_T = 0.0 * (log_q_TB.amax(-1) + tail.sumexp_T + log_p_TB.exp().sum(-1))
        grad_TB = r_TB - log_q_TB.exp() * r_TB.sum(-1, keepdim=True) + poison_T.unsqueeze(-1)
        mass_T = log_probs_TK.exp().sum(-1, dtype=log_q_TB.dtype)
        return value_TB.sum(-1) + poison_T, torch.cat([grad_TB, torch.stack([*tail, mass_T], -1)], -1)

    def num_stats(self, target: Joined) -> int:
        """See ``rounds``."""
        return self.num_stats_of(target[0].shape[-1])

    def num_stats_of(self, num_known: int) -> int:
        """The number of stats for K entries."""
        return num_known + 4

    def gradient(self, student_TV: Tensor, target: Joined, stats_TK: Tensor, upstream_T: Tensor) -> Tensor:
        """See the class."""
        num_known = target[0].shape[-1]
        grad_TB, tail_T3 = stats_TK.split([num_known + 1, 3], -1)
        scale_T1 = upstream_T.unsqueeze(-1) / self.temperature
        max_T1, sum_T1 = tail_T3[:, :1], tail_T3[:, 1:2]
        out = _with_spare_column(student_TV, target[0], -torch.inf)
        exp_(out.sub_(max_T1).div_(self.temperature))
        out.mul_(torch.where(sum_T1 == 0, 0.0, grad_TB[:, -1:] / sum_T1) * scale_T1)
        out.scatter_(-1, _columns(target[0], student_TV), grad_TB[:, :-1] * scale_T1)
        return out[:, :-1]

    @property
    def detail_names(self) -> tuple[str, ...]:
        """The teacher's mass on the known entries."""
        return ("retained_mass",)

    def details(self, stats_TK: Tensor, target: Joined) -> Tensor:
        """See ``detail_names``."""
        return stats_TK[:, -1:]

    def _log_p(self, target: Joined, is_tail_empty_T: Tensor) -> Tensor:
        known_TK = target[1].double()
        if self.renormalize:
            return torch.nn.functional.pad(known_TK.log_softmax(-1), (0, 1), value=-torch.inf)
        if len(target) > 3:
            return torch.cat([known_TK, target[3]], -1)
        tail_T = (1 - known_TK.exp().sum(-1)).clamp_min(MIN_TAIL_MASS).log()
        tail_T = torch.where(is_tail_empty_T, -torch.inf, tail_T)
        return torch.cat([known_TK, tail_T.unsqueeze(-1)], -1)


@dataclass(frozen=True)
class PartialSum(Comparison):
    """sum_k w_k f(log p_k, log q_k) over the known entries, q over the whole vocabulary; w = 1 without weights.

    Without weights this is what several systems call a top-k divergence: no bound, for the mass outside counts nothing.
    With weights 1 / (number of draws * probability of the draw) it is an unbiased estimate of the whole sum: with
    ``num_exact`` the divergence keeps its offset, whose mean is 0, so that equal models have loss and gradient 0. With
    ``estimators`` in place of f, K = 1 and the sampled token, it is k1, k2 or k3. Entries may repeat.

    One all-gather of K + 2 numbers per token. d / d x_j = sum_k w_k r_k [id_k = j] - q_j sum_k w_k r_k.
    """

    divergence: Divergence
    temperature: float
    num_exact: int | None = None
    """Leading entries that are no draws; the variance of the others' sum is estimated from their scatter."""
    is_estimator: bool = False
    """The entry is a sampled token, whose probability is no mass that a support retains."""

    def rounds(self, student_TV: Tensor, target: Joined) -> Rounds:
        """See ``Comparison``; stats = w r of the known entries, max and sum of exp, sum_k p_k, variance."""
        ids_TK, log_probs_TK = target[:2]
        log_q_TK, stats = yield from log_prob_round(student_TV, ids_TK, self.temperature)
        log_p_TK = log_probs_TK.to(log_q_TK.dtype)
        value_TK, r_TK = self._terms(log_p_TK, log_q_TK, target)
        mass_T = log_p_TK.exp().sum(-1)
        numbers = [*stats, mass_T, self._variance(value_TK)]
        poison_T = 0.0 * (stats.sumexp_T.log() + mass_T)  # NaN for a NaN that ``times`` drops
        stats_TK = torch.cat([r_TK + poison_T.unsqueeze(-1), torch.stack(numbers, -1)], -1)
        return value_TK.sum(-1) + poison_T, stats_TK

    def num_stats(self, target: Joined) -> int:
        """See ``rounds``."""
        return self.num_stats_of(target[0].shape[-1])

    def num_stats_of(self, num_known: int) -> int:
        """The number of stats for K entries."""
        return num_known + 4

    def gradient(self, student_TV: Tensor, target: Joined, stats_TK: Tensor, upstream_T: Tensor) -> Tensor:
        """See the class."""
        r_TK, numbers_T4 = stats_TK.split([target[0].shape[-1], 4], -1)
        scale_T1 = upstream_T.unsqueeze(-1) / self.temperature
        out = student_TV.new_zeros(student_TV.shape[0], student_TV.shape[1] + 1, dtype=stats_TK.dtype)
        q_TV = exp_(shifted(student_TV, numbers_T4[:, :1], self.temperature)).div_(numbers_T4[:, 1:2])
        out[:, :-1] = q_TV.mul_(-r_TK.sum(-1, keepdim=True) * scale_T1)
        out.scatter_add_(-1, _columns(target[0], student_TV), r_TK * scale_T1)
        return out[:, :-1]

    @property
    def detail_names(self) -> tuple[str, ...]:
        """The teacher's mass on the known entries; for draws the variance of the estimate, for an estimator nothing."""
        if self.is_estimator:
            return ()
        return ("retained_mass",) if self.num_exact is None else ("variance",)

    def details(self, stats_TK: Tensor, target: Joined) -> Tensor:
        """See ``detail_names``."""
        columns = {"retained_mass": -2, "variance": -1}
        return stats_TK[:, [columns[name] for name in self.detail_names]]

    def _terms(self, log_p_TK: Tensor, log_q_TK: Tensor, target: Joined) -> tuple[Tensor, Tensor]:
        value_TK, r_TK = self.divergence(log_p_TK, log_q_TK)
        if self.divergence.offset and self.num_exact is None:  # it sums to 0 over the whole vocabulary only
            q_TK = log_q_TK.exp()
            value_TK = value_TK - self.divergence.offset * (q_TK - log_p_TK.exp())
            r_TK = r_TK - self.divergence.offset * q_TK
        if len(target) > 2:
            value_TK, r_TK = value_TK * target[2], r_TK * target[2]
        is_absent_TK = (log_p_TK == -torch.inf) & (log_q_TK == -torch.inf)
        return value_TK.masked_fill(is_absent_TK, 0.0), r_TK.masked_fill(is_absent_TK, 0.0)

    def _variance(self, value_TK: Tensor) -> Tensor:
        num_exact = value_TK.shape[-1] if self.num_exact is None else self.num_exact
        num_draws = value_TK.shape[-1] - num_exact
        if num_draws < 2:
            return value_TK.new_zeros(value_TK.shape[0])
        return num_draws * value_TK[:, num_exact:].var(-1)


def log_prob_round(
    logits_TV: Tensor, ids_TK: Tensor, temperature: float
) -> Generator[Tensor, Tensor, tuple[Tensor, SoftmaxStats]]:
    """([T, K] log-probabilities of the ids, normalizer of the whole vocabulary), with one all-gather of K + 2 numbers."""
    packed_TK = numbers_per_row(logits_TV, ids_TK.shape[-1] + 2)
    for rows in row_pieces(logits_TV):
        x_TV = logits_TV[rows].to(packed_TK.dtype)
        max_T1 = local_max(x_TV).unsqueeze(-1)
        sum_T1 = exp_(shifted(x_TV, max_T1, temperature)).sum(-1, keepdim=True)
        packed_TK[rows] = torch.cat([_gathered(x_TV, ids_TK[rows]), max_T1, sum_T1], -1)
    packed_RTK = yield packed_TK
    stats = SoftmaxStats.merged(packed_RTK[..., -2], packed_RTK[..., -1], temperature)
    log_prob_TK = shifted(packed_RTK[..., :-2].amax(0), stats.max_T.unsqueeze(-1), temperature)
    return log_prob_TK.sub_(stats.sumexp_T.log().unsqueeze(-1)), stats


def bucket_round(
    logits_TV: Tensor, ids_TK: Tensor, temperature: float, *, has_tail: bool = True
) -> Generator[Tensor, Tensor, tuple[Tensor, SoftmaxStats]]:
    """([T, K + 1] log-probabilities of the ids and of all other entries together, normalizer of the others).

    With one all-gather of K + 2 numbers per token. Without a tail, the others have probability 0.
    """
    packed_TK = numbers_per_row(logits_TV, ids_TK.shape[-1] + 2)
    for rows in row_pieces(logits_TV):
        tail_TV = _with_spare_column(logits_TV[rows], ids_TK[rows], -torch.inf)[:, :-1]
        max_T1 = local_max(tail_TV).unsqueeze(-1)
        sum_T1 = exp_(shifted(tail_TV, max_T1, temperature)).sum(-1, keepdim=True)
        known_TK = _gathered(logits_TV[rows], ids_TK[rows]).to(max_T1.dtype)
        packed_TK[rows] = torch.cat([known_TK, max_T1, sum_T1], -1)
    packed_RTK = yield packed_TK
    known_TK = packed_RTK[..., :-2].amax(0)
    tail = SoftmaxStats.merged(packed_RTK[..., -2], packed_RTK[..., -1], temperature)
    max_T1 = torch.maximum(known_TK.amax(-1), tail.max_T).unsqueeze(-1)
    tail_T1 = (tail.max_T.unsqueeze(-1) - max_T1) / temperature + tail.sumexp_T.log().unsqueeze(-1)
    if not has_tail:
        tail_T1 = torch.full_like(tail_T1, -torch.inf)
    return torch.cat([(known_TK - max_T1) / temperature, tail_T1], -1).log_softmax(-1), tail


def _gathered(student_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """[T, K] logits of the ids that this rank owns, -inf for others."""
    padded_TV = torch.nn.functional.pad(student_TV, (0, 1), value=-torch.inf)
    return padded_TV.gather(-1, _columns(ids_TK, student_TV))


def _with_spare_column(student_TV: Tensor, ids_TK: Tensor, value: float) -> Tensor:
    """A copy [T, V + 1] in the accumulation dtype with ``value`` at the ids; the last column takes those of other ranks."""
    copy = student_TV.new_empty(
        student_TV.shape[0], student_TV.shape[1] + 1, dtype=accumulation_dtype(student_TV.dtype)
    )
    copy[:, :-1] = student_TV
    return copy.scatter_(-1, _columns(ids_TK, student_TV), value)


def _columns(ids_TK: Tensor, student_TV: Tensor) -> Tensor:
    """Column of each id; the spare one after the last for ids of other ranks (no placeholder may hit a real column)."""
    num_columns = student_TV.shape[-1]
    return torch.where((ids_TK >= 0) & (ids_TK < num_columns), ids_TK, num_columns)
