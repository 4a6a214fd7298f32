"""KL(student || teacher) from the sampled token alone: k1, k2 and k3 (joschu.net/blog/kl-approx.html).

With a ~ q and u = log q(a) - log p(a):

    k1 = u                        unbiased, may be negative, large variance
    k2 = u^2 / 2                  biased, its gradient is unbiased for reverse KL
    k3 = e^-u - 1 + u             unbiased, never negative

As a loss they are differentiated as they are (the mean of the gradient of k1 is 0: it is a metric, not a loss). As the
reward of a policy gradient, -k is a constant and the token's log-probability is differentiated: the gradient is
k d log q(a) / d logit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_gkd.losses.divergences import Separable


def _k1(u: Tensor) -> tuple[Tensor, Tensor]:
    return u, torch.ones_like(u)


def _k2(u: Tensor) -> tuple[Tensor, Tensor]:
    return u.square() / 2, u


def _k3(u: Tensor) -> tuple[Tensor, Tensor]:
    excess = torch.expm1(-u)
    return excess + u, -excess


ESTIMATORS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""Name -> function u -> (value, d value / d u)."""


def make_estimator(name: str, *, policy_gradient: bool) -> Separable:
    """The estimator as entries of ``sparse.PartialSum``: (log p(a), log q(a)) -> (value, r).

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}; loss.estimator is one of {', '.join(ESTIMATORS)}")

    def entries(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        value, r = ESTIMATORS[name](log_q - log_p)
        return value, value if policy_gradient else r

    return Separable(entries)
