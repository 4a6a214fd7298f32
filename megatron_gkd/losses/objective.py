"""What is minimized at a token, and the comparison that computes it."""

from dataclasses import dataclass
from typing import TypedDict, get_args

from megatron_gkd.losses.adaptive import Adaptive
from megatron_gkd.losses.combine import Limited
from megatron_gkd.losses.comparison import Comparison
from megatron_gkd.losses.dense import OneRound, TwoRounds
from megatron_gkd.losses.divergences import AdaptiveKL, Divergence, WeightedKL, make_divergence
from megatron_gkd.losses.estimators import make_estimator
from megatron_gkd.losses.kernels import find_kernels
from megatron_gkd.losses.softmax import Group, Temperatures
from megatron_gkd.losses.sparse import Buckets, PartialSum, Tail
from megatron_gkd.losses.support import HeadAndDraws, OnSupport, SampledToken, TopK


class ObjectiveOptions(TypedDict, total=False):
    """Keyword arguments of the losses; ``Objective`` has their meanings and defaults."""

    divergence: str
    beta: float
    alpha: float
    weight: float
    temperature: float
    teacher_temperature: float | None
    temperature_squared: bool
    max_token_loss: float | None
    support: str
    top_k: int
    num_draws: int
    tail: Tail
    estimator: str
    policy_gradient: bool
    backend: str
    rows_per_pass: int | None


SUPPORTS = ("full", "teacher_top_k", "student_top_k", "union", "sampled", "token")
"""Entries of the vocabulary that a loss can be computed on."""
_GIVEN_SUPPORTS = ("full", "teacher_top_k", "token")
"""Those that entries of a teacher's choice can be: no one can be asked for others."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A divergence between teacher and student, and how the losses apply it.

    Attributes:
        divergence: A name in ``DIVERGENCES``; formulas in ``losses.divergences``.
        beta: Weight of the teacher in the mixture of ``jsd``.
        alpha: Weight of the first argument in the mixture of skewed divergences.
        weight: Share of forward KL in ``mixed_kl``.
        temperature: Divides the student's logits, and the teacher's as well unless that has its own.
        teacher_temperature: Divides the teacher's logits; ``None``: as ``temperature``.
        temperature_squared: Multiply the loss by ``temperature``**2, so that the size of its gradient does not depend on
            the temperature (Hinton et al., arXiv 1503.02531).
        max_token_loss: Largest loss of a token in nats, before that factor; a token beyond it counts as this much and
            has gradient 0. ``None``: no limit.
        support: Entries that the divergence is computed on, a name in ``SUPPORTS``; ``losses.support`` says how they are
            found. With ``sampled`` the sum over all entries is estimated without bias, with ``token`` reverse KL is
            estimated from the token that follows.
        top_k: Entries of ``teacher_top_k`` and ``student_top_k``, half of those of ``union``, and the exact ones of
            ``sampled``.
        num_draws: Entries that ``sampled`` draws from the rest.
        tail: What becomes of the other entries: one more ``bucket``, ``renormalize`` without them, or ``none``.
        estimator: For ``token``: a name in ``ESTIMATORS``.
        policy_gradient: For ``token``: the estimate is a reward and has no gradient itself.
        backend: What computes the passes over logits with ``support="full"``, a name in ``kernels.BACKENDS``.
        rows_per_pass: Rows of one such pass; ``None``: picked from the shapes.

    Raises:
        ValueError: If a value is out of range or the divergence unknown.
    """

    divergence: str
    beta: float = 0.5
    alpha: float = 0.1
    weight: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float | None = None
    temperature_squared: bool = False
    max_token_loss: float | None = None
    support: str = "full"
    top_k: int = 64
    num_draws: int = 16
    tail: Tail = "bucket"
    estimator: str = "k3"
    policy_gradient: bool = False
    backend: str = "auto"
    rows_per_pass: int | None = None

    def __post_init__(self):
        if not self.temperatures.student > 0 or not self.temperatures.teacher > 0:
            raise ValueError(
                f"the loss needs a temperature above 0, got {self.temperatures.student} for the student and "
                f"{self.temperatures.teacher} for the teacher; 1.0 leaves the logits as they are"
            )
        if self.max_token_loss is not None and not self.max_token_loss > 0:
            raise ValueError(
                f"max_token_loss {self.max_token_loss} is not above 0; None means that there is no limit"
            )
        if self.rows_per_pass is not None and self.rows_per_pass < 1:
            raise ValueError(
                f"rows_per_pass {self.rows_per_pass} is not at least 1; None picks it from the shapes"
            )
        self.make_divergence()
        self._check_support()

    @property
    def temperatures(self) -> Temperatures:
        """Of both models."""
        teacher = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        return Temperatures(self.temperature, teacher)

    @property
    def scale(self) -> float:
        """What the comparison's loss is still to be multiplied by."""
        return self.temperature**2 if self.temperature_squared else 1.0

    def make_divergence(self) -> Divergence | AdaptiveKL:
        """The divergence with its parameter."""
        return make_divergence(self.divergence, self.beta, self.alpha, self.weight)

    def against_logits(self, group: Group) -> Comparison:
        """The comparison with a teacher's logits that has the fewest collectives.

        Its target is the logits [T, V]; ``Joined([logits, labels])`` for any support but ``full``.
        """
        if self.support != "full":
            return self.limited(self._on_support(group))
        divergence, kernels = self.make_divergence(), find_kernels(self.backend, self.rows_per_pass)
        if isinstance(divergence, AdaptiveKL):
            return self.limited(Adaptive(group, divergence.head_mass, self.temperatures))
        if isinstance(divergence, WeightedKL):
            return self.limited(OneRound(group, divergence, self.temperatures, kernels))
        return self.limited(TwoRounds(group, divergence, self.temperatures, kernels))

    def limited(self, comparison: Comparison) -> Comparison:
        """``comparison`` with the limit of ``max_token_loss``."""
        if self.max_token_loss is None:
            return comparison
        return Limited(comparison.group, comparison, self.max_token_loss)

    def against_entries(self, group: Group, num_entries: int) -> Comparison:
        """The comparison with a teacher's log-probabilities of some ids; its target is ``losses.sparse``'s.

        With ``support="token"`` each row has one id, the token that follows.

        Raises:
            ValueError: If the support needs other entries than those given.
        """
        if self.support not in _GIVEN_SUPPORTS:
            raise ValueError(
                f"support={self.support} chooses entries from a teacher's logits, but the entries are given; set "
                "support=teacher_top_k, or pass the teacher's logits to distill_loss or linear_distill_loss"
            )
        if self.support == "token" and num_entries != 1:
            raise ValueError(
                f"support=token takes 1 entry per row, the token that follows, but {num_entries} are given; pass ids and "
                "log-probabilities [tokens, 1], or set support=teacher_top_k"
            )
        return self.limited(self._estimated(group) if self.support == "token" else self._sparse(group))

    def _on_support(self, group: Group) -> OnSupport:
        teacher = self.temperatures.teacher
        if self.support == "token":
            return OnSupport(group, SampledToken(), self._estimated(group), teacher)
        if self.support == "sampled":
            chooser = HeadAndDraws(self.top_k, self.num_draws, self.temperatures)
            inner = PartialSum(group, self._separable(), self.temperature, num_exact=self.top_k)
            return OnSupport(group, chooser, inner, teacher)
        chooser = TopK(
            self.top_k, of_teacher=self.support != "student_top_k", of_student=self.support != "teacher_top_k"
        )
        return OnSupport(group, chooser, self._sparse(group), teacher)

    def _estimated(self, group: Group) -> PartialSum:
        entries = make_estimator(self.estimator, policy_gradient=self.policy_gradient)
        return PartialSum(group, entries, self.temperature, is_estimator=True)

    def _sparse(self, group: Group) -> Buckets | PartialSum:
        if self.tail == "none":
            return PartialSum(group, self._separable(), self.temperature)
        return Buckets(group, self._separable(), self.temperature, renormalize=self.tail == "renormalize")

    def _separable(self) -> Divergence:
        divergence = self.make_divergence()
        if isinstance(divergence, AdaptiveKL):
            raise ValueError(
                "adaptive_kl weighs the teacher's whole distribution; it needs support=full and a teacher with logits"
            )
        return divergence

    def _check_support(self) -> None:
        if self.support not in SUPPORTS:
            raise ValueError(
                f"unknown support {self.support!r}; loss.support is one of {', '.join(SUPPORTS)}"
            )
        if self.tail not in get_args(Tail):
            raise ValueError(f"unknown tail {self.tail!r}; loss.tail is one of {', '.join(get_args(Tail))}")
        if self.top_k < 1 or self.num_draws < 2:
            raise ValueError(
                f"top_k {self.top_k} must be at least 1, and num_draws {self.num_draws} at least 2 for a variance"
            )
        if self.support == "token" and self.divergence != "reverse_kl":
            raise ValueError(
                f"support=token estimates reverse_kl, not {self.divergence}; set divergence=reverse_kl"
            )
        if self.support != "token" and (self.estimator != Objective.estimator or self.policy_gradient):
            raise ValueError(
                f"estimator={self.estimator} and policy_gradient={self.policy_gradient} say how support=token estimates, but "
                f"support={self.support} does not; set support=token or leave both out"
            )
        if self.support != "full":
            self._separable()
