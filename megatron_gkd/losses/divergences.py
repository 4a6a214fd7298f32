"""Distillation divergences as pure functions of log-probabilities, and the table of their names.

p is the teacher, q the student. A divergence D = sum_v f(log p_v, log q_v) is a function
``(log_p, log_q) -> (value, r)`` entry by entry, with value = f and r = df / d log q while log q is treated as free.
That is all the rest of the package needs: with E = sum_v r_v, the gradient is dD / d logit_j = r_j - q_j E.

offset (q - p) may be added to f without effect, as long as the sum runs over the whole vocabulary: it sums to 0. The
functions here use it to make every value of a KL at least 0 and the gradient of equal models exactly 0, and name
``offset``, because a sum over a part of the vocabulary has to take it back, unless the part stands for the whole.

To add one: write such a function (an entry of probability 0 contributes 0, see ``times``) and name it in
``DIVERGENCES``. A weighted sum of the two KL directions is a ``WeightedKL``, which needs one collective instead of two.
Equal parameters give the same object (``cache``), because back ends keep what they compiled for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from megatron_gkd.losses.elementwise import exp, times

EntryFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Divergence(Protocol):
    """A sum over the vocabulary, entry by entry."""

    @property
    def offset(self) -> float:
        """The multiple of q - p that the values contain, and of q that r contains."""
        ...

    def __call__(self, log_p: Tensor, log_q: Tensor, /) -> tuple[Tensor, Tensor]:
        """(value, r) of every entry."""
        ...


@dataclass(frozen=True)
class Separable:
    """Any divergence: ``entries`` is (log_p, log_q) -> (value, r).

    Attributes:
        formula: Name of the formula of ``entries`` for a back end that has kernels of its own, with ``weight`` as its
            parameter; without one every back end calls ``entries``.
    """

    entries: EntryFunction
    offset: float = 0.0
    formula: str | None = None
    weight: float = 0.0

    def __call__(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Value and r of every entry."""
        return self.entries(log_p, log_q)


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

    @property
    def offset(self) -> float:
        """Of a log(a / b) - a + b, for both directions."""
        return self.forward - self.reverse

    def __call__(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Value and r of every entry; +inf where the first argument of a KL has mass and the second has none."""
        value = r = torch.zeros_like(log_q)
        if self.forward:
            value = value + self.forward * _kl_terms(log_p, log_q, log_p - log_q)
            r = r + self.forward * (exp(log_q) - exp(log_p))
        if self.reverse:
            value = value + self.reverse * _kl_terms(log_q, log_p, log_q - log_p)
            r = r + self.reverse * times(exp(log_q), log_q - log_p)
        return value, r


def forward_kl() -> Divergence:
    """KL(p || q): covers every mode of the teacher. dD / d logit = q - p."""
    return WeightedKL(forward=1.0, reverse=0.0)


def reverse_kl() -> Divergence:
    """KL(q || p): seeks one mode of the teacher; +inf where p = 0 < q. dD / d logit = q (log q - log p - D)."""
    return WeightedKL(forward=0.0, reverse=1.0)


@cache
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

    return Separable(divergence, formula="jsd", weight=beta)


@cache
def skew_forward_kl(alpha: float) -> Divergence:
    """KL(p || m), m = alpha p + (1 - alpha) q (DistiLLM, arXiv 2402.03898); bounded by -log alpha; alpha = 0: forward KL.

    dD / d logit = (1 - alpha) q (sum_v q_v p_v / m_v - p / m).
    """
    if _check_alpha("skew_forward_kl", alpha) == 0.0:
        return forward_kl()

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_p_over_m, _ = _log_ratios_to_mixture(log_p, log_q, alpha)
        r = times(exp(log_q), log_p_over_m.expm1()).mul_(alpha - 1)
        return _kl_terms(log_p, log_q, log_p_over_m, share_b=1 - alpha), r

    return Separable(divergence, offset=1 - alpha, formula="skew_forward_kl", weight=alpha)


@cache
def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q || m), m = (1 - alpha) p + alpha q; finite where the teacher excludes an entry; alpha = 0: reverse KL.

    dD / d logit = r - q sum_v r_v with r = q (log(q / m) - alpha q / m).
    """
    if _check_alpha("skew_reverse_kl", alpha) == 0.0:
        return reverse_kl()

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        _, log_q_over_m = _log_ratios_to_mixture(log_p, log_q, 1 - alpha)
        r = times(exp(log_q), log_q_over_m - alpha * log_q_over_m.expm1())
        return _kl_terms(log_q, log_p, log_q_over_m, share_b=1 - alpha), r

    return Separable(divergence, offset=alpha - 1, formula="skew_reverse_kl", weight=alpha)


def mixed_kl(weight: float) -> Divergence:
    """D = weight KL(p || q) + (1 - weight) KL(q || p), in one collective.

    Raises:
        ValueError: If ``weight`` is outside [0, 1].
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(
            f"mixed_kl needs weight in [0, 1], got {weight}; it is the share of forward KL, the rest is reverse KL"
        )
    return WeightedKL(forward=weight, reverse=1 - weight)


@cache
def tvd() -> Divergence:
    """Total variation 1/2 sum |p - q|, in [0, 1]: every entry pulls with its q alone, outliers do not dominate.

    r = 1/2 q sign(q - p), 0 where they are equal.
    """

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = exp(log_q)
        sign = torch.sign(log_q - log_p).nan_to_num_(nan=0.0)  # both excluded: q = 0
        return (q - exp(log_p)).abs_().mul_(0.5), q.mul_(sign).mul_(0.5)

    return Separable(divergence, formula="tvd")


@dataclass(frozen=True)
class AdaptiveKL:
    """w KL(p || q) + (1 - w) KL(q || p) with w found for each token (AKL, arXiv 2404.02657), and without gradient.

    w = g_head / (g_head + g_tail), the share of sum_v |p_v - q_v| that lies in the head: the smallest set of the
    teacher's most probable entries that holds ``head_mass``. Where the head is wrong, forward KL repairs it; where the
    tail is, reverse KL. w = 1/2 for equal models.
    """

    head_mass: float = 0.5


DIVERGENCES: dict[str, Callable[[float, float, float], Divergence | AdaptiveKL]] = {
    "forward_kl": lambda beta, alpha, weight: forward_kl(),
    "reverse_kl": lambda beta, alpha, weight: reverse_kl(),
    "jsd": lambda beta, alpha, weight: jsd(beta),
    "skew_forward_kl": lambda beta, alpha, weight: skew_forward_kl(alpha),
    "skew_reverse_kl": lambda beta, alpha, weight: skew_reverse_kl(alpha),
    "mixed_kl": lambda beta, alpha, weight: mixed_kl(weight),
    "adaptive_kl": lambda beta, alpha, weight: AdaptiveKL(),
    "tvd": lambda beta, alpha, weight: tvd(),
}
"""Name -> factory (beta, alpha, weight) -> divergence; a factory uses the parameters that it has."""


def make_divergence(name: str, beta: float, alpha: float, weight: float) -> Divergence | AdaptiveKL:
    """The divergence called ``name``.

    Raises:
        ValueError: If the name is unknown or its parameter is out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; loss.divergence is one of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](beta, alpha, weight)


def _check_alpha(name: str, alpha: float) -> float:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(
            f"{name} needs alpha in [0, 1), got {alpha}; it is how much of its first argument the mixture holds"
        )
    return alpha


def _kl_terms(log_a: Tensor, log_b: Tensor, log_a_over_m: Tensor, share_b: float = 1.0) -> Tensor:
    """Entries a log(a / m) - a + m of m = (1 - share_b) a + share_b b: at least 0; of second order where a is near b.

    There the three are added before a multiplies them: the rounding of the logarithms, larger than the divergence of
    similar models, cancels.
    """
    log_b_over_a = log_b - log_a
    a = exp(log_a)
    near = a * (log_a_over_m + share_b * log_b_over_a.expm1())
    far = times(a, log_a_over_m) + share_b * (exp(log_b) - a)
    return torch.where(log_b_over_a.abs() < 1, near, far)


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
