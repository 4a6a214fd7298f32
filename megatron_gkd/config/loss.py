"""The loss section."""

from functools import lru_cache
from typing import Any, Literal, Self, TypedDict

from pydantic import Field, ValidationError, model_validator

from megatron_gkd.config.base import Config, Free
from megatron_gkd.config.explain import explain

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "mixed_kl",
    "adaptive_kl",
    "tvd",
]

Support = Literal["full", "teacher_top_k", "student_top_k", "union", "sampled", "token"]

Backend = Literal["auto", "eager", "compiled", "triton"]


class LossSettings(Config):
    """A divergence between teacher and student, and how it is computed: keyword arguments of the public loss functions."""

    divergence: str = "forward_kl"
    """A name in ``losses.DIVERGENCES``; the loss section has its own list, because it loads without torch."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of the teacher in the mixture of jsd; 0 is exactly forward_kl and 1 exactly reverse_kl."""
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Weight of the first distribution in the mixture of skew_forward_kl and skew_reverse_kl; 0: the plain KL."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of forward KL in mixed_kl; the rest is reverse KL."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of the student, and of the teacher unless teacher_temperature is given."""
    teacher_temperature: float | None = Field(default=None, gt=0)
    """Divides the logits of the teacher; null: as temperature."""
    temperature_squared: bool = False
    """Multiply the divergence by temperature squared, so that its gradient keeps its size."""
    max_token_loss: float | None = Field(default=None, gt=0)
    """Largest divergence of one token in nats, before temperature squared; a token beyond it counts as this much and
    has gradient 0. null: no limit."""
    support: Support = "full"
    """Entries of the vocabulary that the divergence is computed on: all, the most probable ones of the teacher, of the
    student or of either, a random sample that estimates all without bias, or the sampled token alone. A teacher that
    sends its top-k supports teacher_top_k and token only."""
    top_k: int = Field(default=64, ge=1)
    """Entries of teacher_top_k and student_top_k, of each model in union, and those that sampled takes exactly."""
    num_draws: int = Field(default=16, ge=2)
    """Entries that sampled draws from the rest; at least 2, to estimate the variance."""
    tail: Literal["bucket", "renormalize", "none"] = "bucket"
    """Treatment of the entries outside a top-k: one bucket for all of them, distributions over the top-k alone, or
    left out."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """How support=token estimates reverse_kl from log q - log p of the token; formulas in docs/losses.md."""
    policy_gradient: bool = False
    """With support=token, take the estimate as the negative reward of a policy gradient instead of differentiating it."""
    backend: Free[Backend] = "auto"
    """Back end of the passes over the logits with support=full: eager, plain torch; compiled, the same fused by
    torch.compile, faster on a CPU with a C++ compiler, but compiling takes some 30 s once; triton, kernels for a GPU. auto:
    chosen from the device and the length of the run, logged with the reason."""
    rows_per_pass: Free[int | None] = Field(default=None, ge=1)
    """Rows of one elementwise pass over a chunk, for eager and compiled; null: what stays in a CPU's cache, from the shapes."""

    @model_validator(mode="after")
    def _support_fits_divergence(self) -> Self:
        if self.support == "token" and self.divergence != "reverse_kl":
            raise ValueError(
                f"support=token estimates reverse_kl, but divergence={self.divergence}; set divergence=reverse_kl"
            )
        if self.support != "full" and self.divergence == "adaptive_kl":
            raise ValueError(
                f"divergence=adaptive_kl weighs the whole distribution, but support={self.support}; set support=full"
            )
        return self

    @model_validator(mode="after")
    def _estimator_is_for_the_token(self) -> Self:
        if self.support == "token":
            return self
        if self.estimator != type(self).model_fields["estimator"].default:
            raise ValueError(
                f"estimator={self.estimator} is for support=token, but support={self.support} ignores it; remove it or set "
                "support=token"
            )
        if self.policy_gradient:
            raise ValueError(
                f"policy_gradient=true is for support=token, but support={self.support} ignores it; remove it or set "
                "support=token"
            )
        return self


class LossOptions(TypedDict, total=False):
    """``LossSettings`` as keyword arguments; a test compares the two."""

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
    tail: str
    estimator: str
    policy_gradient: bool
    backend: str
    rows_per_pass: int | None


@lru_cache
def loss_settings(**options: Any) -> LossSettings:
    """The options, validated.

    Raises:
        ValueError: If one is out of range or two of them do not fit.
    """
    try:
        return LossSettings(**options)
    except ValidationError as error:
        problems = [explain(problem, LossSettings) for problem in error.errors(include_url=False)]
        raise ValueError("loss: " + "; ".join(problems)) from None


class LossConfig(LossSettings):
    """Which divergence pulls the student towards the teacher, and on which entries of the vocabulary."""

    divergence: Divergence = "forward_kl"
    """forward_kl covers all modes of the teacher, reverse_kl seeks one, jsd, the skewed, mixed and adaptive forms lie
    between, tvd is the total variation; formulas in docs/losses.md."""
    teacher_logit_scale: float = Field(default=1.0, gt=0)
    """Multiplies the teacher's logits before anything else (logit_scale of some models)."""
    teacher_logit_soft_cap: float | None = Field(default=None, gt=0)
    """Bounds the teacher's logits by cap * tanh(logit / cap) after the scale (final_logit_softcapping of some models);
    null: no bound."""
    sft_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the cross-entropy of the completion tokens: (1 - sft_weight) * divergence + sft_weight * cross-entropy.
    1 goes with teacher.kind=none."""
    tokens_per_chunk: Free[int | None] = Field(default=None, ge=1)
    """Tokens of a chunk, whose logits exist at one time (those of two chunks where tensor parallelism overlaps the
    collectives of one with the products of the next); smaller saves memory. null: 64 MiB of fp32 logits on a rank, clamped to
    [256, 2048] tokens."""
    certify: bool = True
    """Compare value and gradients of this loss with float64 on a small problem before training, and refuse to train if
    they are wrong."""
