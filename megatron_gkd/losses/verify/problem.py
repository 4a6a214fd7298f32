"""The small problem that a loss is certified on: inputs equal on all ranks, and the shard of one rank.

Inputs lie on a binary grid that bfloat16 holds, and on which float32 forms the logits without rounding in any order.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size, K = known entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.config.loss import LossSettings, loss_settings
from megatron_gkd.losses.divergences import DIVERGENCES, ESTIMATORS
from megatron_gkd.losses.fused_linear import LMHead
from megatron_gkd.losses.kernels import triton
from megatron_gkd.losses.sparse import KnownEntries

TOP_K = 9
_HIDDEN, _TEACHER_HIDDEN = 32, 48
_CANDIDATES_PER_TOKEN = 8
_MIN_TOKENS = 64
"""The rounding of a gradient to bfloat16 has its mean, 1.7e-3, only over many numbers."""
_MAX_SCALE, _MIN_SOFT_CAP = 2.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss to certify.

    Attributes:
        settings: The divergence; ``None`` for cross-entropy alone. A support takes 9 entries; ``sampled`` is certified
            with a head that holds the whole vocabulary, where it is exact.
        dtype: Number format of hidden states and heads.
        tokens_per_chunk: Rows of a chunk.
        sft_weight: Share of the cross-entropy.
        from_entries: The teacher sends its 9 most probable entries instead of hidden states.
        teacher_scale: Multiplies the teacher's logits; certified with at most 2, for larger logits have larger rounding.
        teacher_soft_cap: Bounds them, see ``LMHead``; certified with at least 10, for a smaller one makes ties.
        num_columns: Real vocabulary entries for each rank.
    """

    settings: LossSettings | None
    dtype: torch.dtype = torch.float32
    tokens_per_chunk: int = 256
    sft_weight: float = 0.0
    from_entries: bool = False
    teacher_scale: float = 1.0
    teacher_soft_cap: float | None = None
    num_columns: int = 61

    @property
    def num_tokens(self) -> int:
        """Full chunks, more than one if they are small, and a last one that is not full (unless a chunk is one token)."""
        num_full = -(-_MIN_TOKENS // self.tokens_per_chunk)
        return num_full * self.tokens_per_chunk + max(1, min(self.tokens_per_chunk // 3, 40))

    def vocab_size(self, tp_size: int) -> int:
        """Real entries of the whole vocabulary."""
        return self.num_columns * tp_size

    def rows_per_rank(self) -> int:
        """Rows of each rank's heads; the last rank's end with padding. Row strides are aligned if ``num_columns`` are."""
        return self.num_columns + (16 if self.num_columns % 16 == 0 else 3)

    def scaled_down(self, tp_size: int) -> "Case":
        """With the number of entries that the problem has, and logits of its size."""
        if self.settings is None:
            return self
        top_k = self.vocab_size(tp_size) if self.settings.support == "sampled" else TOP_K
        cap = self.teacher_soft_cap
        return replace(
            self,
            settings=self.settings.model_copy(update={"top_k": top_k}),
            teacher_scale=min(self.teacher_scale, _MAX_SCALE),
            teacher_soft_cap=cap and max(cap, _MIN_SOFT_CAP),
        )

    def on_tiles(self) -> list["Case"]:
        """The case in which a Triton kernel steps over tiles, with aligned and with unaligned row strides.

        Two tiles and a remainder: a row of one tile never rescales an online softmax. Triton compiles one binary for
        strides that are multiples of 16 and another for the rest.
        """
        sizes = (2 * triton.TILE + 48, 2 * triton.TILE + 61)
        return [
            replace(self, num_columns=size, tokens_per_chunk=min(self.tokens_per_chunk, 16)) for size in sizes
        ]

    def __str__(self) -> str:
        if self.settings is None:
            return "cross_entropy"
        settings = self.settings
        parts = [settings.divergence]
        if self.from_entries:
            parts.append("received")
        if settings.support != "full":
            parts.append(settings.support)
        if settings.support in ("teacher_top_k", "student_top_k", "union"):
            parts.append(settings.tail)
        if settings.support == "token":
            parts.append(settings.estimator + " reward" * settings.policy_gradient)
        if self.teacher_scale != 1.0:
            parts.append(f"scale {self.teacher_scale:g}")
        if self.teacher_soft_cap is not None:
            parts.append(f"soft cap {self.teacher_soft_cap:g}")
        return " ".join(parts + ["+ cross_entropy"] * (self.sft_weight > 0))


def every_case(
    names: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32, tokens_per_chunk: int = 256
) -> Iterator[Case]:
    """Every loss there is, or those of the divergences ``names``."""

    def case(settings: LossSettings | None, sft_weight: float = 0.0, *, from_entries: bool = False) -> Case:
        how = {"dtype": dtype, "tokens_per_chunk": tokens_per_chunk, "from_entries": from_entries}
        return Case(settings=settings, sft_weight=sft_weight, **how)

    for name in names or DIVERGENCES:
        yield case(loss_settings(divergence=name))
        yield case(loss_settings(divergence=name), 0.3)
        if name == "adaptive_kl":
            continue
        yield case(loss_settings(divergence=name, support="sampled"))
        for support in ("teacher_top_k", "student_top_k", "union"):
            for tail in ("bucket", "renormalize", "none"):
                settings = loss_settings(divergence=name, support=support, tail=tail)
                yield case(settings)
                if support == "teacher_top_k":
                    yield case(settings, from_entries=True)
    if names is None or "reverse_kl" in names:
        for estimator in ESTIMATORS:
            for is_reward in (False, True):
                token = {"support": "token", "estimator": estimator, "policy_gradient": is_reward}
                yield case(loss_settings(divergence="reverse_kl", **token))
    if names is None:
        yield case(None, 1.0)


class Problem(NamedTuple):
    """The whole problem in float64, equal on all ranks."""

    student_TH: Tensor
    student_head_VH: Tensor
    teacher_TH: Tensor
    teacher_head_VH: Tensor
    labels_T: Tensor
    weight_T: Tensor


class Shard(NamedTuple):
    """Inputs of the loss under test: this rank's part, in the number format of the case."""

    student: LMHead
    teacher: LMHead
    labels_T: Tensor
    known: KnownEntries
    weight_T: Tensor
    valid_vocab_size: int


def make_problem(num_tokens: int, vocab_size: int) -> Problem:
    """Correlated student and teacher with logits of standard deviation about 3, and no ties at the end of their top k."""
    rng = torch.Generator().manual_seed(0)

    def on_grid(rows: int, columns: int, std: float, step: float) -> Tensor:
        return (torch.randn(rows, columns, generator=rng, dtype=torch.float64) * std / step).round() * step

    num_candidates = _CANDIDATES_PER_TOKEN * num_tokens
    teacher_TH = on_grid(num_candidates, _TEACHER_HIDDEN, 1.0, 2**-4)
    teacher_head_VH = on_grid(vocab_size, _TEACHER_HIDDEN, 3.0 / _TEACHER_HIDDEN**0.5, 2**-5)
    student_TH = teacher_TH[:, :_HIDDEN] + on_grid(num_candidates, _HIDDEN, 0.3, 2**-4)
    student_head_VH = teacher_head_VH[:, :_HIDDEN] + on_grid(vocab_size, _HIDDEN, 0.1, 2**-5)
    is_clear_T = _has_clear_top(teacher_TH @ teacher_head_VH.T) & _has_clear_top(
        student_TH @ student_head_VH.T
    )
    assert is_clear_T.sum() >= num_tokens, "too few rows without a tie"
    teacher_TH, student_TH = (rows_TH[is_clear_T][:num_tokens] for rows_TH in (teacher_TH, student_TH))
    labels_T = torch.randint(vocab_size, (num_tokens,), generator=rng)
    weight_T = torch.rand(num_tokens, generator=rng).double()
    return Problem(student_TH, student_head_VH, teacher_TH, teacher_head_VH, labels_T, weight_T)


def _has_clear_top(logits_TV: Tensor) -> Tensor:
    """[T] no tie between the last entry of the top k and the next one, in bfloat16 and so in any finer format.

    With a tie either may be chosen, and which one depends on how the vocabulary is split.
    """
    top_TK = logits_TV.bfloat16().topk(TOP_K + 1, -1).values
    return top_TK[:, -2] > top_TK[:, -1]


def shard_of(problem: Problem, case: Case, rank: int, tp_size: int, device: torch.device) -> Shard:
    """A rank's part of the problem, its leaves ready for a gradient."""

    def placed(x: Tensor) -> Tensor:
        return x.to(device, case.dtype, copy=True)

    student_head_VH, teacher_head_VH = (
        placed(rows_of_rank(head_VH, case, rank, tp_size, fill=7.0))
        for head_VH in (problem.student_head_VH, problem.teacher_head_VH)
    )
    student_TH, teacher_TH = placed(problem.student_TH), placed(problem.teacher_TH)
    ids_TK, log_probs_TK = known_entries(problem, case)
    return Shard(
        LMHead(student_TH.requires_grad_(), student_head_VH.requires_grad_()),
        LMHead(teacher_TH, teacher_head_VH, scale=case.teacher_scale, soft_cap=case.teacher_soft_cap),
        problem.labels_T.to(device),
        KnownEntries(ids_TK.to(device), log_probs_TK.to(device)),
        problem.weight_T.float().to(device),
        len(problem.student_head_VH),
    )


def rows_of_rank(head_VH: Tensor, case: Case, rank: int, tp_size: int, fill: float) -> Tensor:
    """This rank's rows of a head, after padding it for all ranks."""
    num_padding = case.rows_per_rank() * tp_size - len(head_VH)
    padding = head_VH.new_full((num_padding, head_VH.shape[1]), fill)
    return torch.cat([head_VH, padding]).chunk(tp_size)[rank]


def teacher_logits(problem: Problem, case: Case) -> Tensor:
    """[T, vocabulary] in float64, with the scale and the cap of the case."""
    logits_TV = case.teacher_scale * (problem.teacher_TH @ problem.teacher_head_VH.T)
    cap = case.teacher_soft_cap
    return logits_TV if cap is None else cap * (logits_TV / cap).tanh()


def known_entries(problem: Problem, case: Case) -> tuple[Tensor, Tensor]:
    """([T, K] ids, log-probabilities in float32) that a teacher would send; rows know different numbers of them."""
    settings = case.settings or LossSettings()
    temperature = settings.teacher_temperature or settings.temperature
    log_p_TV = (teacher_logits(problem, case) / temperature).log_softmax(-1).float()
    ids_TK = log_p_TV.topk(TOP_K, -1).indices
    num_known_T1 = (torch.arange(len(ids_TK)) % TOP_K + 1).unsqueeze(-1)
    return ids_TK.where(torch.arange(TOP_K) < num_known_T1, -1), log_p_TV.gather(1, ids_TK)
