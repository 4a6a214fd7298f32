"""Distillation losses over a whole vocabulary in float64, by textbook formulas and plain autograd.

The reference of the certificate and of every loss test. It shares no code with the losses, and must never do.

Shapes: T = tokens, V = the whole vocabulary, H = hidden size.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dense_divergence(
    student_TV: Tensor,
    teacher_TV: Tensor,
    name: str,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    temperature_squared: bool = False,
    max_token_loss: float | None = None,
    **parameters: Any,
) -> Tensor:
    """[T] divergence in nats; logits must be float64."""
    assert student_TV.dtype == teacher_TV.dtype == torch.float64
    q = (student_TV / temperature).softmax(-1)
    p = (teacher_TV / (teacher_temperature or temperature)).softmax(-1)
    loss_T = dense_formula(p, q, name, **parameters)
    if max_token_loss is not None:
        loss_T = loss_T.clamp(max=max_token_loss)
    return loss_T * temperature**2 if temperature_squared else loss_T


def dense_support(student_TV: Tensor, teacher_TV: Tensor, support: str, top_k: int) -> Tensor:
    """[T, V] True at the entries of a support that the models' logits choose."""
    masks = [
        torch.zeros_like(logits_TV, dtype=torch.bool).scatter_(1, logits_TV.topk(top_k, -1).indices, True)
        for name, logits_TV in (("student_top_k", student_TV), ("teacher_top_k", teacher_TV))
        if support in (name, "union")
    ]
    return masks[0] | masks[-1]


def dense_estimate(
    student_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor, estimator: str, policy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """[T] (value of the estimator, what is differentiated) at the sampled token."""
    rows = torch.arange(len(labels_T))
    log_q_T, log_p_T = (torch.log(z.softmax(-1)[rows, labels_T]) for z in (student_TV, teacher_TV))
    u_T = log_q_T - log_p_T
    value_T = {"k1": u_T, "k2": u_T**2 / 2, "k3": torch.exp(-u_T) - 1 + u_T}[estimator]
    return value_T, value_T.detach() * log_q_T if policy_gradient else value_T


def dense_formula(p: Tensor, q: Tensor, name: str, **parameters: Any) -> Tensor:
    """[T] divergence of probabilities, with those of ``parameters`` that its formula takes."""
    taken = inspect.signature(FORMULAS[name]).parameters
    return FORMULAS[name](p, q, **{key: value for key, value in parameters.items() if key in taken})


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)


def _jsd(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0, 1):
        return _kl(p, q) if beta == 0 else _kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _mixed_kl(p: Tensor, q: Tensor, weight: Any = 0.5) -> Tensor:
    return weight * _kl(p, q) + (1 - weight) * _kl(q, p)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "jsd": _jsd,
    "skew_forward_kl": lambda p, q, alpha=0.1: _kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, alpha=0.1: _kl(q, (1 - alpha) * p + alpha * q),
    "mixed_kl": _mixed_kl,
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
    "adaptive_kl": lambda p, q: _mixed_kl(p, q, _head_share_of_gap(p.detach(), q.detach())),
}
"""Name -> (p, q, the divergence's own parameters) -> [T]; a divergence that is added registers its own."""


def _head_share_of_gap(p: Tensor, q: Tensor) -> Tensor:
    """[T] part of sum |p - q| on the smallest set of likely teacher entries that holds half of the mass."""
    ordered = p.sort(-1, descending=True).values
    last = (ordered.cumsum(-1) < 0.5).sum(-1, keepdim=True)
    is_head = p >= ordered.gather(-1, last)
    gap = (p - q).abs()
    total = gap.sum(-1)
    return torch.where(total == 0, 0.5, (gap * is_head).sum(-1) / total)


def dense_top_k(
    student_TV: Tensor,
    known_TV: Tensor,
    teacher_TV: Tensor,
    name: str,
    tail: str,
    *,
    temperature: float = 1.0,
    **parameters: float,
) -> Tensor:
    """[T] divergence where only the entries under the mask ``known_TV`` are known; ``teacher_TV``: probabilities."""
    rows = zip(student_TV / temperature, known_TV, teacher_TV, strict=True)
    return torch.stack([_known_row(*row, name, tail, parameters) for row in rows])


def _known_row(x_V: Tensor, known_V: Tensor, p_V: Tensor, name: str, tail: str, parameters: dict) -> Tensor:
    q_V, p_K = x_V.softmax(-1), p_V[known_V]
    q_K = q_V[known_V]
    if tail == "none":
        return dense_formula(p_K, q_K, name, **parameters)
    if tail == "renormalize":
        return dense_formula(p_K / p_K.sum(), x_V[known_V].softmax(-1), name, **parameters)
    if known_V.all():
        return dense_formula(p_K, q_K, name, **parameters)
    rest_q = q_V[~known_V].sum(-1, keepdim=True)
    p_B, q_B = torch.cat([p_K, 1 - p_K.sum(-1, keepdim=True)]), torch.cat([q_K, rest_q])
    return dense_formula(p_B, q_B, name, **parameters)


def dense_known(ids_TK: Tensor, log_probs_TK: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """([T, V] True at the ids, float64 probabilities there and 0 elsewhere); negative ids are none."""
    columns = ids_TK.where(ids_TK >= 0, vocab)
    probabilities = torch.zeros(len(ids_TK), vocab + 1, dtype=torch.float64)
    probabilities.scatter_(1, columns, log_probs_TK.double().exp())
    mask = torch.zeros(probabilities.shape, dtype=torch.bool).scatter_(1, columns, True)
    return mask[:, :-1], probabilities[:, :-1]


def dense_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[T] -log softmax(logits)[label]."""
    return -torch.log(logits_TV.softmax(-1)[torch.arange(len(labels_T)), labels_T])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
