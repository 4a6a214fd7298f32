"""Distillation losses over a whole vocabulary in float64, by textbook formulas and plain autograd.

The reference of every loss test; it shares no code with ``megatron_gkd``.

Shapes: T = tokens, V = the whole vocabulary, H = hidden size.
"""

import torch
from torch import Tensor


def dense_divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    name: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    weight: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """[T] divergence in nats; logits must be float64."""
    assert student_TV.dtype == teacher_TV.dtype == torch.float64
    q, p = (student_TV / temperature).softmax(-1), (teacher_TV / temperature).softmax(-1)
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return _kl(p, q)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return _kl(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    if name == "skew_forward_kl":
        return _kl(p, alpha * p + (1 - alpha) * q)
    if name == "mixed_kl":
        return weight * _kl(p, q) + (1 - weight) * _kl(q, p)
    raise ValueError(f"no dense reference for {name!r}")


def dense_linear(
    student_TH: Tensor, student_head_VH: Tensor, teacher_TH: Tensor, teacher_head_VH: Tensor, name: str, **how
):
    """[T] divergence of the logits hidden @ head^T."""
    return dense_divergence(student_TH @ student_head_VH.T, teacher_TH @ teacher_head_VH.T, name, **how)


def dense_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[T] -log softmax(logits)[label]."""
    return -torch.log(logits_TV.softmax(-1)[torch.arange(len(labels_T)), labels_T])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)
