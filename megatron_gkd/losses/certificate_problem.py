"""The small problem that a loss is certified on: inputs equal on all ranks, and the shard of one rank.

Inputs lie on a binary grid that bfloat16 holds, and on which float32 forms the logits without rounding in any order.

Shapes: T = tokens, V = vocabulary entries held by this rank, H = hidden size, K = known entries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.losses.chunked import Layer
from megatron_gkd.losses.objective import Objective

TOP_K = 9
_HIDDEN, _TEACHER_HIDDEN = 32, 48
_CANDIDATES_PER_TOKEN = 8
_MIN_TOKENS = 64
"""The rounding of a gradient to bfloat16 has its mean, 1.7e-3, only over many numbers."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss to certify.

    Attributes:
        objective: The divergence; ``None`` for cross-entropy alone. A support takes 9 entries; ``sampled`` is certified
            with a head that holds the whole vocabulary, where it is exact.
        dtype: Number format of hidden states and heads.
        tokens_per_chunk: Rows of a chunk.
        sft_weight: Share of the cross-entropy.
        from_entries: The teacher sends its 9 most probable entries instead of hidden states.
        teacher_scale: Multiplies the teacher's logits; certified with at most 2, for larger logits have larger rounding.
        teacher_soft_cap: Bounds them, see ``Layer``; certified with at least 10, for a smaller one makes ties.
    """

    objective: Objective | None
    dtype: torch.dtype = torch.float32
    tokens_per_chunk: int = 256
    sft_weight: float = 0.0
    from_entries: bool = False
    teacher_scale: float = 1.0
    teacher_soft_cap: float | None = None

    @property
    def num_tokens(self) -> int:
        """Full chunks, more than one if they are small, and a last one that is not full (unless a chunk is one token)."""
        num_full = -(-_MIN_TOKENS // self.tokens_per_chunk)
        return num_full * self.tokens_per_chunk + max(1, min(self.tokens_per_chunk // 3, 40))

    def __str__(self) -> str:
        if self.objective is None:
            return "cross_entropy"
        parts = [self.objective.divergence]
        if self.from_entries:
            parts.append("received")
        if self.objective.support != "full":
            parts.append(self.objective.support)
        if self.objective.support in ("teacher_top_k", "student_top_k", "union"):
            parts.append(self.objective.tail)
        if self.objective.support == "token":
            parts.append(self.objective.estimator + " reward" * self.objective.policy_gradient)
        if self.teacher_scale != 1.0:
            parts.append(f"scale {self.teacher_scale:g}")
        if self.teacher_soft_cap is not None:
            parts.append(f"soft cap {self.teacher_soft_cap:g}")
        return " ".join(parts + ["+ cross_entropy"] * (self.sft_weight > 0))


class Problem(NamedTuple):
    """The whole problem in float64, equal on all ranks."""

    student_TH: Tensor
    student_head_VH: Tensor
    teacher_TH: Tensor
    teacher_head_VH: Tensor
    labels_T: Tensor
    weight_T: Tensor


class Shard(NamedTuple):
    """What the loss under test gets: this rank's part, in the number format of the case."""

    student: Layer
    teacher: Layer
    labels_T: Tensor
    ids_TK: Tensor
    log_probs_TK: Tensor
    weight_T: Tensor
    valid_vocab_size: int


def make_problem(num_tokens: int, vocab: int) -> Problem:
    """Correlated student and teacher with logits of standard deviation about 3, and one answer to what their top k are."""
    rng = torch.Generator().manual_seed(0)

    def on_grid(rows: int, columns: int, std: float, step: float) -> Tensor:
        return (torch.randn(rows, columns, generator=rng, dtype=torch.float64) * std / step).round() * step

    num_candidates = _CANDIDATES_PER_TOKEN * num_tokens
    teacher_TH = on_grid(num_candidates, _TEACHER_HIDDEN, 1.0, 2**-4)
    teacher_head_VH = on_grid(vocab, _TEACHER_HIDDEN, 3.0 / _TEACHER_HIDDEN**0.5, 2**-5)
    student_TH = teacher_TH[:, :_HIDDEN] + on_grid(num_candidates, _HIDDEN, 0.3, 2**-4)
    student_head_VH = teacher_head_VH[:, :_HIDDEN] + on_grid(vocab, _HIDDEN, 0.1, 2**-5)
    is_clear_T = _has_clear_top(teacher_TH @ teacher_head_VH.T) & _has_clear_top(
        student_TH @ student_head_VH.T
    )
    assert is_clear_T.sum() >= num_tokens, "too few rows without a tie"
    teacher_TH, student_TH = (rows_TH[is_clear_T][:num_tokens] for rows_TH in (teacher_TH, student_TH))
    labels_T = torch.randint(vocab, (num_tokens,), generator=rng)
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

    heads = (problem.student_head_VH, problem.teacher_head_VH)
    student_head_VH, teacher_head_VH = (placed(rows_of_rank(head, rank, tp_size, fill=7.0)) for head in heads)
    student = Layer(placed(problem.student_TH).requires_grad_(), student_head_VH.requires_grad_())
    ids_TK, log_probs_TK = known_entries(problem, case)
    return Shard(
        student,
        Layer(
            placed(problem.teacher_TH),
            teacher_head_VH,
            scale=case.teacher_scale,
            soft_cap=case.teacher_soft_cap,
        ),
        problem.labels_T.to(device),
        ids_TK.to(device),
        log_probs_TK.to(device),
        problem.weight_T.float().to(device),
        len(problem.student_head_VH),
    )


def rows_of_rank(head_VH: Tensor, rank: int, tp_size: int, fill: float) -> Tensor:
    """This rank's rows, after padding to 64 for each rank."""
    padding = head_VH.new_full((64 * tp_size - len(head_VH), head_VH.shape[1]), fill)
    return torch.cat([head_VH, padding]).chunk(tp_size)[rank]


def teacher_logits(problem: Problem, case: Case) -> Tensor:
    """[T, vocabulary] in float64, with the scale and the cap of the case."""
    logits_TV = case.teacher_scale * (problem.teacher_TH @ problem.teacher_head_VH.T)
    cap = case.teacher_soft_cap
    return logits_TV if cap is None else cap * (logits_TV / cap).tanh()


def known_entries(problem: Problem, case: Case) -> tuple[Tensor, Tensor]:
    """([T, K] ids, log-probabilities in float32) that a teacher would send; rows know different numbers of them."""
    logits_TV = teacher_logits(problem, case)
    temperature = 1.0 if case.objective is None else case.objective.temperatures.teacher
    log_p_TV = (logits_TV / temperature).log_softmax(-1).float()
    ids_TK = log_p_TV.topk(TOP_K, -1).indices
    num_known_T1 = (torch.arange(len(ids_TK)) % TOP_K + 1).unsqueeze(-1)
    return ids_TK.where(torch.arange(TOP_K) < num_known_T1, -1), log_p_TV.gather(1, ids_TK)
