"""Inputs and cases that the tests of the losses share.

Hidden states and heads lie on a coarse binary grid, so that float32 forms hidden @ head^T exactly, in any order: what is
then measured against float64 is the loss's own arithmetic, not the rounding of a matrix product.

Shapes: T = tokens, V = the whole vocabulary, H = hidden size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.losses import DIVERGENCES

SEPARABLE = [name for name in DIVERGENCES if name != "adaptive_kl"]
"""Divergences that are a sum over entries."""

DIVERGENCE_CASES = (
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9, "temperature": 2.0}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
    ("forward_kl", {"temperature": 2.0}),
    ("reverse_kl", {"temperature": 0.7}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_forward_kl", {"alpha": 0.7, "temperature": 2.0}),
    ("skew_forward_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.7, "temperature": 2.0}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("mixed_kl", {"weight": 0.3}),
    ("mixed_kl", {"weight": 1.0}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"temperature": 2.0}),
    ("tvd", {}),
    ("forward_kl", {"temperature": 2.0, "teacher_temperature": 1.5, "temperature_squared": True}),
    ("jsd", {"temperature": 0.8, "teacher_temperature": 1.5}),
    ("reverse_kl", {"max_token_loss": 0.7}),
    ("jsd", {"temperature": 2.0, "temperature_squared": True, "max_token_loss": 0.0578}),
)
"""One row for each divergence at least, and for each way of applying it."""

SMOOTH_CASES = tuple((name, how) for name, how in DIVERGENCE_CASES if name not in ("adaptive_kl", "tvd"))
"""Cases for gradcheck: adaptive_kl holds its weights constant, tvd has kinks."""


def case_names(cases: Sequence[tuple[str, dict]]) -> list[str]:
    """An id for each case."""
    return [" ".join([name, *(f"{key}={value}" for key, value in how.items())]) for name, how in cases]


CASE_NAMES = case_names(DIVERGENCE_CASES)


TOP_K_CASES = tuple(
    (name, how, tail)
    for name, how in DIVERGENCE_CASES
    if name != "adaptive_kl" and set(how) <= {"beta", "alpha", "weight", "temperature"}
    for tail in ("bucket", "renormalize", "none")
)
"""Divergences that are known on a few entries, by what becomes of the others."""


class LinearInputs(NamedTuple):
    """Float64 inputs of the linear losses; every number is exact in float32 (and in bfloat16)."""

    student_TH: Tensor
    student_head_VH: Tensor
    teacher_TH: Tensor
    teacher_head_VH: Tensor


def make_logits(
    tokens: int = 24, vocab: int = 512, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Correlated float64 (student, teacher) logits whose numbers are exact in float32."""
    rng = torch.Generator().manual_seed(seed)
    teacher_TV = torch.randn(tokens, vocab, generator=rng) * scale
    student_TV = 0.7 * teacher_TV + torch.randn(tokens, vocab, generator=rng) * scale / 3
    return student_TV.double(), teacher_TV.double()


def make_linear_inputs(
    tokens: int = 24, vocab: int = 512, hidden: int = 48, teacher_hidden: int = 64, seed: int = 0
) -> LinearInputs:
    """Correlated student and teacher with logits of standard deviation about 3."""
    rng = torch.Generator().manual_seed(seed)

    def on_grid(shape: tuple[int, int], std: float, step: float) -> Tensor:
        return (torch.randn(shape, generator=rng, dtype=torch.float64) * std / step).round() * step

    teacher_TH = on_grid((tokens, teacher_hidden), 1.0, 2**-4)
    teacher_head_VH = on_grid((vocab, teacher_hidden), 3.0 / teacher_hidden**0.5, 2**-5)
    student_TH = teacher_TH[:, :hidden] + on_grid((tokens, hidden), 0.3, 2**-4)
    student_head_VH = teacher_head_VH[:, :hidden] + on_grid((vocab, hidden), 0.1, 2**-5)
    return LinearInputs(student_TH, student_head_VH, teacher_TH, teacher_head_VH)


def make_known_entries(
    teacher_TV: Tensor, most: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """([T, K] ids, log-probabilities in ``dtype``) of the most probable entries; the rows know 1 to ``most`` of them."""
    ids_TK = teacher_TV.topk(most, -1).indices
    num_known_T1 = (torch.arange(len(ids_TK)) % most + 1).unsqueeze(-1)
    log_probs_TK = teacher_TV.log_softmax(-1).gather(1, ids_TK)
    return ids_TK.where(torch.arange(most) < num_known_T1, -1), log_probs_TK.to(dtype)


def make_labels(tokens: int, vocab: int, seed: int = 0) -> Tensor:
    """[T] ids, the first and the last one of the vocabulary among them."""
    labels_T = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels_T[0], labels_T[-1] = 0, vocab - 1
    return labels_T


def make_similar_logits(tokens: int, vocab: int, distance: float) -> tuple[Tensor, Tensor]:
    """(student, teacher) [T, V] in float64 whose digits float32 holds; their KL is about distance^2 / 2 nats."""
    rng = torch.Generator().manual_seed(3)
    teacher_TV, noise_TV = (torch.randn(tokens, vocab, generator=rng, dtype=torch.float64) for _ in range(2))
    teacher_TV = (3 * teacher_TV).float().double()
    return (teacher_TV + distance * noise_TV).float().double(), teacher_TV


def make_independent_logits(tokens: int, vocab: int, std: float) -> tuple[Tensor, Tensor]:
    """(student, teacher) [T, V] in float64 whose digits float32 holds, without anything in common."""
    rng = torch.Generator().manual_seed(4)
    student_TV, teacher_TV = (
        (std * torch.randn(tokens, vocab, generator=rng, dtype=torch.float64)).float().double()
        for _ in range(2)
    )
    return student_TV, teacher_TV


def make_upstream(tokens: int, seed: int = 0) -> Tensor:
    """[T] float64 upstream gradient or token weight, exact in float32, with a 0 in it."""
    upstream_T = torch.rand(tokens, generator=torch.Generator().manual_seed(seed + 100)).double()
    upstream_T[tokens // 2] = 0
    return upstream_T
