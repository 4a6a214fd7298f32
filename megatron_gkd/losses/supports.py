"""Entries of the vocabulary that a divergence is computed on, chosen from the logits of both models.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = chosen entries, C = candidates, N = draws, R = ranks.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.dense import merged_normalizers
from megatron_gkd.losses.kernels.eager import log_softmax_pair, normalizers
from megatron_gkd.losses.sparse import BucketLoss, PartialSumLoss, SparseTarget, bucket_round, log_prob_round
from megatron_gkd.losses.token_loss import TokenLoss
from megatron_gkd.losses.vocab_parallel import Temperatures, accumulation_dtype, exp_
from megatron_gkd.parallel.gathering import Rounds

_COLUMNS_PER_RANK = 1 << 32


class SupportTarget(NamedTuple):
    """The teacher's logits [T, V], and the token that follows each row [T], counted from this rank's first column."""

    teacher_TV: Tensor
    label_columns_T: Tensor


class Chosen(NamedTuple):
    """Entries of each row.

    Attributes:
        columns_TK: int64 column of this rank; -1 where another rank owns the entry, or there is none.
        weight_TK: Weight of the entry in a sum, equal on all ranks; 1 for an entry that is no draw.
    """

    columns_TK: Tensor
    weight_TK: Tensor


Choice = Generator[Tensor, Tensor, Chosen]
"""Yields this rank's numbers for a collective and is sent all ranks', as ``Rounds``; returns the same on every rank."""


@dataclass(frozen=True)
class SupportLoss(TokenLoss):
    """A sparse loss on chosen entries; the target is a ``SupportTarget``.

    One all-gather for the teacher's log-probabilities of the entries, beside those of the chooser and of ``inner``. The
    choice has no gradient. saved = (the ``SparseTarget`` of the chosen entries, saved of the inner loss).
    """

    chooser: "TopK | SampledToken | HeadAndDraws"
    inner: BucketLoss | PartialSumLoss
    teacher_temperature: float

    @override
    def rounds(self, student_TV: Tensor, target: SupportTarget) -> Rounds:
        rank = 0 if self.group is None else self.group.rank()
        chosen = yield from self.chooser.choose(student_TV, target, rank)
        sparse = yield from self._sparse_target(target.teacher_TV, chosen)
        loss_T, saved = yield from self.inner.rounds(student_TV, sparse)
        return loss_T, (sparse, saved)

    @override
    def gradient(self, student_TV: Tensor, target: SupportTarget, saved: Any, upstream_T: Tensor) -> Tensor:
        sparse, of_inner = saved
        return self.inner.gradient(student_TV, sparse, of_inner, upstream_T)

    @property
    @override
    def metric_names(self) -> tuple[str, ...]:
        return self.inner.metric_names

    @override
    def metrics(self, saved: Any) -> tuple[Tensor, ...]:
        return self.inner.metrics(saved[1])

    def _sparse_target(self, teacher_TV: Tensor, chosen: Chosen) -> Generator[Tensor, Tensor, SparseTarget]:
        if isinstance(self.inner, BucketLoss):  # its tail is summed, because 1 - sum_k p_k would cancel
            log_p_TB, _ = yield from bucket_round(teacher_TV, chosen.columns_TK, self.teacher_temperature)
            return SparseTarget(chosen.columns_TK, log_p_TB[:, :-1], chosen.weight_TK, log_p_TB[:, -1:])
        log_p_TK, _ = yield from log_prob_round(teacher_TV, chosen.columns_TK, self.teacher_temperature)
        return SparseTarget(chosen.columns_TK, log_p_TK, chosen.weight_TK)


@dataclass(frozen=True)
class TopK:
    """The most probable entries of the teacher, of the student, or of either; one all-gather of 2 k numbers for each."""

    k: int
    of_teacher: bool
    of_student: bool

    def choose(self, student_TV: Tensor, target: SupportTarget, rank: int) -> Choice:
        """The entries of each row; one that both models chose counts once."""
        models = [target.teacher_TV] * self.of_teacher + [student_TV] * self.of_student
        packed_RTC = yield torch.cat([_candidates(model_TV, self.k) for model_TV in models], -1)
        keys = [_winners(part, self.k) for part in packed_RTC.split(2 * self.k, -1)]
        if len(keys) == 2:
            is_repeated_TK = (keys[1].unsqueeze(-1) == keys[0].unsqueeze(-2)).any(-1)
            keys[1] = torch.where(is_repeated_TK, -1, keys[1])
        columns_TK = _columns_of(torch.cat(keys, -1), rank)
        return Chosen(columns_TK, packed_RTC.new_ones(columns_TK.shape))


@dataclass(frozen=True)
class SampledToken:
    """The token that follows in the sequence."""

    def choose(self, student_TV: Tensor, target: SupportTarget, rank: int) -> Choice:
        """The entry of each row; no collective."""
        yield from ()
        columns_T1 = target.label_columns_T.unsqueeze(-1)
        is_owned_T1 = (columns_T1 >= 0) & (columns_T1 < student_TV.shape[-1])
        weight_T1 = torch.ones_like(columns_T1, dtype=torch.float32)
        return Chosen(torch.where(is_owned_T1, columns_T1, -1), weight_T1)


@dataclass(frozen=True)
class HeadAndDraws:
    """The teacher's k most probable entries, and draws with replacement from the rest.

    An entry of the rest is drawn with probability proportional to (p + q) / 2, so that neither direction of KL meets a
    weight without bound. The uniform numbers are rank 0's, and the rest is ordered by id: the draws do not depend on how
    the vocabulary is split. Three all-gathers.
    """

    k: int
    num_draws: int
    temperatures: Temperatures

    def choose(self, student_TV: Tensor, target: SupportTarget, rank: int) -> Choice:
        """The entries of each row."""
        teacher_TV = target.teacher_TV
        norms_T4 = normalizers(student_TV, teacher_TV, None, self.temperatures)[:, :4]
        uniform_TN = torch.rand(len(norms_T4), self.num_draws, dtype=norms_T4.dtype, device=norms_T4.device)
        packed_RTC = yield torch.cat([_candidates(teacher_TV, self.k), norms_T4, uniform_TN], -1)
        head, norms_RT4, uniform_RTN = packed_RTC.split([2 * self.k, 4, self.num_draws], -1)
        head_TK = _columns_of(_winners(head, self.k), rank)
        norms_T4 = merged_normalizers(norms_RT4, self.temperatures)
        proposal_TV = self._proposal(student_TV, teacher_TV, norms_T4, head_TK)
        mass_RT1 = yield proposal_TV.sum(-1, keepdim=True)
        columns_TN = _invert(proposal_TV, mass_RT1, uniform_RTN[0], rank)
        own_TN = torch.nn.functional.pad(proposal_TV, (0, 1)).gather(-1, columns_TN)
        drawn_TN = (yield own_TN).sum(0)
        weight_TN = torch.where(drawn_TN == 0, 0.0, mass_RT1.sum(0) / (self.num_draws * drawn_TN))
        columns_TN = torch.where(columns_TN == proposal_TV.shape[-1], -1, columns_TN)
        columns_TK = torch.cat([head_TK, columns_TN], -1)
        return Chosen(columns_TK, torch.cat([weight_TN.new_ones(head_TK.shape), weight_TN], -1))

    def _proposal(self, student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor, head_TK: Tensor) -> Tensor:
        """[T, V] (p + q) / 2, 0 at the head."""
        log_q_TV, log_p_TV = log_softmax_pair(student_TV, teacher_TV, norms_T4, self.temperatures)
        mean_TV = exp_(log_q_TV).add_(exp_(log_p_TV)).div_(2)
        padded_TV = torch.nn.functional.pad(mean_TV, (0, 1))
        return padded_TV.scatter_(-1, torch.where(head_TK < 0, mean_TV.shape[-1], head_TK), 0.0)[:, :-1]


def _invert(proposal_TV: Tensor, mass_RT1: Tensor, uniform_TN: Tensor, rank: int) -> Tensor:
    """[T, N] column whose share of the cumulative mass holds each uniform number; V where another rank owns it."""
    upper_RT1 = mass_RT1.cumsum(0)
    wanted_TN = uniform_TN * upper_RT1[-1]
    owner_TN = (wanted_TN >= upper_RT1[:-1]).sum(0)
    cumulative_TV = proposal_TV.cumsum(-1)
    num_columns = proposal_TV.shape[-1]
    if num_columns == 0:
        return torch.zeros_like(owner_TN)
    within_TN = (wanted_TN - (upper_RT1[rank] - mass_RT1[rank])).clamp_min(0)
    # rounding must not lead beyond the last entry that has mass
    within_TN = torch.minimum(within_TN, cumulative_TV[:, -1:] * (1 - 1e-6))
    column_TN = torch.searchsorted(cumulative_TV.contiguous(), within_TN.contiguous(), right=True)
    is_owner_TN = (owner_TN == rank) & (mass_RT1[rank] > 0)
    return torch.where(is_owner_TN, column_TN.clamp(max=num_columns - 1), num_columns)


def _candidates(logits_TV: Tensor, k: int) -> Tensor:
    """[T, 2 k] this rank's largest logits, then the bits of their columns, filled up with -inf and -1."""
    num_found = min(k, logits_TV.shape[-1])
    values_TK, columns_TK = logits_TV.topk(num_found, -1)
    values_TK = values_TK.to(accumulation_dtype(logits_TV.dtype))
    values_TK = torch.nn.functional.pad(values_TK, (0, k - num_found), value=-torch.inf)
    columns_TK = torch.nn.functional.pad(columns_TK, (0, k - num_found), value=-1)
    # as integers of the same width: one all-gather carries both, and no column is rounded
    return torch.cat([values_TK, columns_TK.to(_integer(values_TK)).view(values_TK.dtype)], -1)


def _winners(packed_RTC: Tensor, k: int) -> Tensor:
    """[T, k] keys (owner and column) of the largest logits of all ranks; -1 where there are fewer."""
    values_TC, bits_TC = (part.movedim(0, 1).flatten(1) for part in packed_RTC.split(k, -1))
    values_TK, place_TK = values_TC.topk(k, -1)
    columns_TC = bits_TC.contiguous().view(_integer(values_TC)).long()
    key_TK = place_TK // k * _COLUMNS_PER_RANK + columns_TC.gather(-1, place_TK)
    return torch.where(values_TK == -torch.inf, -1, key_TK)


def _integer(x: Tensor) -> torch.dtype:
    return torch.int64 if x.dtype == torch.float64 else torch.int32


def _columns_of(key_TK: Tensor, rank: int) -> Tensor:
    is_owned_TK = (key_TK >= 0) & (key_TK // _COLUMNS_PER_RANK == rank)
    return torch.where(is_owned_TK, key_TK % _COLUMNS_PER_RANK, -1)
