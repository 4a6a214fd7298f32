"""Inputs and cases that the tests of the losses share.

Hidden states and heads lie on a coarse binary grid, so that float32 forms hidden @ head^T exactly, in any order: what is
then measured against float64 is the loss's own arithmetic, not the rounding of a matrix product.

Shapes: T = tokens, V = the whole vocabulary, H = hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
)
CASE_NAMES = [
    " ".join([name, *(f"{key}={value}" for key, value in how.items())]) for name, how in DIVERGENCE_CASES
]


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


def make_labels(tokens: int, vocab: int, seed: int = 0) -> Tensor:
    """[T] ids, the first and the last one of the vocabulary among them."""
    labels_T = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels_T[0], labels_T[-1] = 0, vocab - 1
    return labels_T


def make_upstream(tokens: int, seed: int = 0) -> Tensor:
    """[T] float64 upstream gradient or token weight, exact in float32, with a 0 in it."""
    upstream_T = torch.rand(tokens, generator=torch.Generator().manual_seed(seed + 100)).double()
    upstream_T[tokens // 2] = 0
    return upstream_T
