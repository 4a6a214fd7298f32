"""Distillation divergences as pure functions of log-probabilities, and the table of their names.

p is the teacher, q the student. A divergence D = sum_v f(log p_v, log q_v) is a function
``(log_p, log_q) -> (value, r)`` entry by entry, with value = f and r = df / d log q while log q is treated as free.
That is all the rest of the package needs: with E = sum_v r_v, the gradient is dD / d logit_j = r_j - q_j E.

To add one: write such a function (an entry of probability 0 contributes 0, see ``times``) and name it in
``DIVERGENCES``. A weighted sum of the two KL directions is a ``WeightedKL``, which needs one collective instead of two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.losses.elementwise import exp, times

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WeightedKL:
    """forward * KL(p || q) + reverse * KL(q || p).

    Both are affine in the logarithms of the normalizers, so a split vocabulary needs one collective for them.
    """

    forward: float
    reverse: float

    def __post_init__(self):
        if not self.forward and not self.reverse:
            raise ValueError("a weighted KL needs a weight other than 0 for at least one direction")

    def __call__(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Value and r of every entry; +inf where the first argument of a KL has mass and the second has none."""
        value = r = torch.zeros_like(log_q)
        if self.forward:
            p = exp(log_p)
            value, r = value + self.forward * times(p, log_p - log_q), r - self.forward * p
        if self.reverse:
            term = self.reverse * times(exp(log_q), log_q - log_p)
            value, r = value + term, r + term
        return value, r


def forward_kl() -> Divergence:
    """KL(p || q): covers every mode of the teacher. dD / d logit = q - p."""
    return WeightedKL(forward=1.0, reverse=0.0)


def reverse_kl() -> Divergence:
    """KL(q || p): seeks one mode of the teacher; +inf where p = 0 < q. dD / d logit = q (log q - log p - D)."""
    return WeightedKL(forward=0.0, reverse=1.0)


def jsd(beta: float) -> Divergence:
    """Generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649).

    D = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. It tends to 0 for beta -> 0 and
    beta -> 1; as TRL, Liger-Kernel and ms-swift do, the end points are defined as forward and reverse KL instead.

    Raises:
        ValueError: If ``beta`` is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"jsd needs beta in [0, 1], got {beta}; it is the teacher's weight in the mixture")
    if beta in (0.0, 1.0):
        return forward_kl() if beta == 0.0 else reverse_kl()

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_p_over_m, log_q_over_m = _log_ratios_to_mixture(log_p, log_q, beta)
        student = times(exp(log_q), log_q_over_m).mul_(1 - beta)
        return times(exp(log_p), log_p_over_m).mul_(beta).add_(student), student

    return divergence


DIVERGENCES: dict[str, Callable[[float, float, float], Divergence]] = {
    "forward_kl": lambda beta, alpha, weight: forward_kl(),
    "reverse_kl": lambda beta, alpha, weight: reverse_kl(),
    "jsd": lambda beta, alpha, weight: jsd(beta),
}
"""Name -> factory (beta, alpha, weight) -> divergence; a factory uses the parameters that it has."""


def make_divergence(name: str, beta: float, alpha: float, weight: float) -> Divergence:
    """The divergence called ``name``.

    Raises:
        ValueError: If the name is unknown or its parameter is out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; loss.divergence is one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](beta, alpha, weight)


def _log_ratios_to_mixture(log_p: Tensor, log_q: Tensor, weight_p: float) -> tuple[Tensor, Tensor]:
    """(log p/m, log q/m) for m = weight_p p + (1 - weight_p) q; both exactly 0 where p = q.

    With d = log p - log q: log m = max(log p, log q) + log1p(w expm1(-|d|)), where w is the weight of the smaller of
    the two. Unlike logaddexp this keeps its relative accuracy as d -> 0, and it holds for infinite d.
    """
    d = log_p - log_q
    w = (
        0.5 if weight_p == 0.5 else d.sign().mul_(0.5 - weight_p).add_(0.5)
    )  # weight_p where d < 0, else 1 - weight_p
    log_max_over_m = d.abs().neg_().expm1_().mul_(w).log1p_().neg_()
    return log_max_over_m + d.clamp(max=0), log_max_over_m.sub_(d.clamp(min=0))
