"""Distillation divergences as pure functions of log-probabilities, and the registries of their names.

p is the teacher, q the student. A divergence D = sum_v f(log p_v, log q_v) is called with (log p, log q) and returns
(value, r) entry by entry: value = f, and r = df / d log q with log q treated as free. Nothing else is needed: with
E = sum_v r_v, the gradient is dD / d logit_j = r_j - q_j E.

A multiple c of q may be subtracted from r without effect on that gradient, for E falls by c. It matters for its digits:
where the student has nearly all mass on entries that the teacher excludes, r = c q there, and r - q E cancels. So a
divergence may also be given top_ratio = p / q at the student's most probable entry of each row, and choose c by it. In
far rows, where it is less than ``FAR``, the values may lack multiples of p and q in the same way, whose sum is ``far_value``.

offset (q - p) may be added to f without effect as long as the sum runs over the whole vocabulary, where it is 0. The
KLs use it to make every value at least 0 and the gradient of equal models exactly 0; they declare it as ``offset``,
because a sum over a part of the vocabulary must subtract it again, unless the part stands for the whole.

CONTRIBUTING.md shows how to add one. Instances with equal parameters are equal: kernels compiled for one serve the other.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.losses.vocab_parallel import exp, exp_, expm1, mixed_, times_

FAR = 0.125
"""Rows are far whose top_ratio is less: c is chosen so that r keeps its digits where p is nearly 0."""

Entries = tuple[Tensor, Tensor]
"""(value, r) of every entry."""


class Divergence(ABC):
    """A sum over the vocabulary, entry by entry."""

    @property
    def offset(self) -> float:
        """Multiple of q - p that the values contain, and of q that r contains."""
        return 0.0

    @property
    def far_value(self) -> float:
        """What the values of a far row lack."""
        return 0.0

    @abstractmethod
    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None, /) -> Entries:
        """(value, r) of every entry; ``top_ratio``, with a column for each row, may shift r by a multiple of q."""


@dataclass(frozen=True)
class Separable(Divergence):
    """A divergence given by a function (log_p, log_q) -> (value, r)."""

    entries: Callable[[Tensor, Tensor], Entries]
    offset: float = 0.0

    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None) -> Entries:
        """(value, r) of every entry."""
        return self.entries(log_p, log_q)


@dataclass(frozen=True)
class WeightedKL(Divergence):
    """forward * KL(p || q) + reverse * KL(q || p).

    Both are affine in the logarithms of the normalizers, so a split vocabulary needs a single collective.
    """

    forward: float
    reverse: float

    def __post_init__(self):
        if not self.forward and not self.reverse:
            raise ValueError("a weighted KL needs a weight other than 0 for at least one direction")

    @property
    def offset(self) -> float:
        """The entries are a log(a / b) - a + b in both directions."""
        return self.forward - self.reverse

    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None) -> Entries:
        """(value, r); +inf where the first argument of a KL has mass and the second has none."""
        value = r = torch.zeros_like(log_q)
        p, q = exp(log_p), exp(log_q)
        if self.forward:
            value = value + self.forward * kl_entries(p, q, log_q - log_p, log_p - log_q)
            r = r + self.forward * (q - p)
        if self.reverse:
            value = value + self.reverse * kl_entries(q, p, log_p - log_q, log_q - log_p)
            r = r + self.reverse * times_(log_q - log_p, q)
        return value, r


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649), 0 < beta < 1.

    D = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    """

    beta: float

    @property
    def far_value(self) -> float:
        """The entropy of the weights, -beta log beta - (1 - beta) log(1 - beta)."""
        return -self.beta * math.log(self.beta) - (1 - self.beta) * math.log1p(-self.beta)

    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None) -> Entries:
        """R = (1 - beta) q log(q / m), minus its limit for p = 0 in far rows."""
        far = _is_far(top_ratio)
        log_p_over_m, log_m_over_q = _log_ratios_to_mixture(log_p, log_q, self.beta, far)
        r = times_(log_m_over_q, exp(log_q)).mul_(self.beta - 1)
        return times_(log_p_over_m, exp(log_p)).mul_(self.beta).add_(r), r


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) of DistiLLM (arXiv 2402.03898), at most -log alpha; 0 < alpha < 1.

    dD / d logit = (1 - alpha) q (sum_v q_v p_v / m_v - p / m).
    """

    alpha: float

    @property
    def offset(self) -> float:
        """The entries are p log(p / m) - p + m."""
        return 1 - self.alpha

    @property
    def far_value(self) -> float:
        """The limit of log(p / m) where q = 0."""
        return -math.log(self.alpha)

    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None) -> Entries:
        """R = (1 - alpha) q (1 - p / m), without the 1 in far rows."""
        far = _is_far(top_ratio)
        log_p_over_m, _ = _log_ratios_to_mixture(log_p, log_q, self.alpha, far)
        ratio, p, q = expm1(log_p_over_m), exp(log_p), exp(log_q)
        if far is not None:
            ratio = mixed_(ratio, exp(log_p_over_m).div_(self.alpha), far)
        r = times_(ratio, q).mul_(self.alpha - 1)
        return kl_entries(p, q, log_q - log_p, log_p_over_m, 1 - self.alpha), r


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q), finite where the teacher excludes an entry; 0 < alpha < 1."""

    alpha: float

    @property
    def offset(self) -> float:
        """The entries are q log(q / m) - q + m."""
        return self.alpha - 1

    @property
    def far_value(self) -> float:
        """The limit of log(q / m) where p = 0."""
        return -math.log(self.alpha)

    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None) -> Entries:
        """R = q (log(q / m) - alpha (q / m - 1)), minus its limit for p = 0 in far rows."""
        far = _is_far(top_ratio)
        log_q_over_m = _log_ratios_to_mixture(log_p, log_q, 1 - self.alpha, far)[1].neg_()
        # in far rows the factor alpha is in log_q_over_m
        share = self.alpha if far is None else self.alpha + (1 - self.alpha) * far
        p, q = exp(log_p), exp(log_q)
        r = times_(log_q_over_m - expm1(log_q_over_m).mul_(share), q)
        return kl_entries(q, p, log_p - log_q, log_q_over_m, 1 - self.alpha), r


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation 1/2 sum |p - q|, in [0, 1]: outliers do not dominate, every entry pulls with its q alone."""

    def __call__(self, log_p: Tensor, log_q: Tensor, top_ratio: Tensor | None = None) -> Entries:
        """R = 1/2 q sign(q - p), 0 where they are equal; minus the sign at the student's most probable entry."""
        q = exp(log_q)
        sign = torch.sign(log_q - log_p).nan_to_num_(nan=0.0)  # NaN: both excluded, q = 0
        if top_ratio is not None:
            sign = sign - torch.sign(1 - top_ratio)
        return (q - exp(log_p)).abs_().mul_(0.5), q.mul_(sign).mul_(0.5)


@dataclass(frozen=True)
class AdaptiveKL:
    """w KL(p || q) + (1 - w) KL(q || p) with w per token (AKL, arXiv 2404.02657); w receives no gradient.

    w = g_head / (g_head + g_tail), the share of sum_v |p_v - q_v| that falls on the head: the smallest set of the
    teacher's most probable entries that holds ``head_mass``. w = 1/2 for equal models.
    """

    head_mass: float = 0.5


def forward_kl() -> Divergence:
    """KL(p || q): covers every mode of the teacher. dD / d logit = q - p."""
    return WeightedKL(forward=1.0, reverse=0.0)


def reverse_kl() -> Divergence:
    """KL(q || p): seeks one mode of the teacher; +inf where p = 0 < q. dD / d logit = q (log q - log p - D)."""
    return WeightedKL(forward=0.0, reverse=1.0)


def jsd(beta: float) -> Divergence:
    """``JSD``; at its ends forward and reverse KL, as in TRL, Liger-Kernel, ms-swift. ``ValueError`` outside [0, 1]."""
    _check(
        0.0 <= beta <= 1.0, f"jsd needs beta in [0, 1], got {beta}; it is the teacher's weight in the mixture"
    )
    if beta in (0.0, 1.0):
        return forward_kl() if beta == 0.0 else reverse_kl()
    return JSD(beta)


def skew_forward_kl(alpha: float) -> Divergence:
    """``SkewForwardKL``; forward KL for alpha = 0. ``ValueError`` outside [0, 1)."""
    _check(0.0 <= alpha < 1.0, f"skew_forward_kl needs alpha in [0, 1), got {alpha}; {_ALPHA}")
    return SkewForwardKL(alpha) if alpha else forward_kl()


def skew_reverse_kl(alpha: float) -> Divergence:
    """``SkewReverseKL``; reverse KL for alpha = 0. ``ValueError`` outside [0, 1)."""
    _check(0.0 <= alpha < 1.0, f"skew_reverse_kl needs alpha in [0, 1), got {alpha}; {_ALPHA}")
    return SkewReverseKL(alpha) if alpha else reverse_kl()


def mixed_kl(weight: float) -> Divergence:
    """D = weight KL(p || q) + (1 - weight) KL(q || p), in one collective. ``ValueError`` for a weight outside [0, 1]."""
    _check(
        0.0 <= weight <= 1.0,
        f"mixed_kl needs weight in [0, 1], got {weight}; it is the share of forward KL, the rest is reverse KL",
    )
    return WeightedKL(forward=weight, reverse=1 - weight)


_ALPHA = "it is how much of its first argument the mixture holds"


def _check(is_right: bool, problem: str) -> None:
    if not is_right:
        raise ValueError(problem)


DIVERGENCES: dict[str, Callable[..., Divergence | AdaptiveKL]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "mixed_kl": mixed_kl,
    "adaptive_kl": lambda: AdaptiveKL(),
    "tvd": TVD,
}
"""Name -> factory, whose arguments are keys of the loss section."""


def make_divergence(name: str, **parameters: Any) -> Divergence | AdaptiveKL:
    """The divergence called ``name``, built from those of ``parameters`` that its factory takes.

    Raises:
        ValueError: If the name is unknown or its parameter is out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; loss.divergence is one of {', '.join(DIVERGENCES)}")
    factory = DIVERGENCES[name]
    taken = inspect.signature(factory).parameters
    return factory(**{key: value for key, value in parameters.items() if key in taken})


def _k1(u: Tensor) -> Entries:
    return u, torch.ones_like(u)


def _k2(u: Tensor) -> Entries:
    return u.square() / 2, u


def _k3(u: Tensor) -> Entries:
    excess = torch.expm1(-u)
    return excess + u, -excess


ESTIMATORS: dict[str, Callable[[Tensor], Entries]] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""Estimators of KL(q || p) from a token a ~ q alone, by name: u = log q(a) - log p(a) -> (value, d value / d u).

k1 = u is unbiased, of large variance, and its gradient has mean 0: a metric or a reward, not a loss. k2 = u^2 / 2 is
biased, its gradient is unbiased for reverse KL. k3 = e^-u - 1 + u is unbiased and never negative. See
joschu.net/blog/kl-approx.html.
"""


def make_estimator(name: str, *, policy_gradient: bool) -> Separable:
    """The estimator as entries (log p(a), log q(a)) -> (value, r).

    With ``policy_gradient`` -value is a constant reward of the token, so that the gradient is value * d log q(a) / d logit.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; loss.estimator is one of {', '.join(ESTIMATORS)}")

    def entries(log_p: Tensor, log_q: Tensor) -> Entries:
        value, r = ESTIMATORS[name](log_q - log_p)
        return value, value if policy_gradient else r

    return Separable(entries)


def kl_entries(
    a: Tensor, b: Tensor, log_b_over_a: Tensor, log_a_over_m: Tensor, share_b: float = 1.0
) -> Tensor:
    """[T, V] entries a log(a / m) - a + m of KL(a || m), each at least 0, for m = (1 - share_b) a + share_b b.

    They are of second order where a is near b: the three are added before a multiplies them, so that the rounding of the
    logarithms cancels. What b has beyond e a is added apart, because b / a may overflow.
    """
    growth = expm1(log_b_over_a.clamp(max=1)).mul_(share_b).add_(log_a_over_m)
    return times_(growth, a).add_((b - math.e * a).clamp_(min=0).mul_(share_b))


def _is_far(top_ratio: Tensor | None) -> Tensor | None:
    """1 for far rows, else 0; ``None`` where a CPU sees none."""
    if top_ratio is None:
        return None
    far = top_ratio < FAR
    is_visible = not torch.compiler.is_compiling() and far.device.type == "cpu"
    return None if is_visible and not far.any() else far.to(top_ratio.dtype)


def _log_ratios_to_mixture(
    log_p: Tensor, log_q: Tensor, weight_p: float, far: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(log p/m, log m/q) for m = weight_p p + (1 - weight_p) q; 0 where p = q and not far.

    With d = log p - log q: log m = max(log p, log q) + log1p(w expm1(-|d|)), where w is the weight of the smaller of
    the two. Unlike logaddexp this keeps its relative accuracy as d -> 0, and it holds for infinite d.

    In far rows each lacks its limit where the other of p and q is 0: -log(weight_p) and log(1 - weight_p). With
    d = log(weight_p p) - log((1 - weight_p) q) what is left is -log1p(e^-d) and log1p(e^d), with all digits.
    """
    d = log_p - log_q
    if far is not None and weight_p != 0.5:
        d.add_(far, alpha=math.log(weight_p) - math.log1p(-weight_p))
    smaller = d.abs().neg_()
    # the weight of the smaller one: weight_p where d < 0, else 1 - weight_p
    w = 0.5 if weight_p == 0.5 else d.sign().mul_(0.5 - weight_p).add_(0.5)
    inner = expm1(smaller).mul_(w)
    if far is not None:
        inner = mixed_(inner, exp_(smaller), far)
    log_m_over_max = inner.log1p_()
    log_m_over_q = d.clamp(min=0).add_(log_m_over_max)
    return d.clamp_(max=0).sub_(log_m_over_max), log_m_over_q
