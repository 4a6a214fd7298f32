"""The rollout section: one class per kind of engine, with the sampling keys in common.

A further kind is a class over ``BaseRolloutConfig`` and a line in ``RolloutConfig``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, Tag, field_validator, model_validator
from typing_extensions import override

from megatron_gkd.config.base import Config, Free, kind_discriminator
from megatron_gkd.config.hf_shapes import HfShapes

_OF_COLOCATED_SERVERS = (
    "tensor_model_parallel_size",
    "start_timeout_s",
    "mem_fraction_static",
    "num_threads",
)


class BaseRolloutConfig(Config):
    """Sampling keys, the capabilities of a kind of engine, and its checks of its own keys."""

    uses_student_model: ClassVar[bool] = False
    """It generates with the student's own layers, on its ranks and in its layout."""
    receives_weights: ClassVar[bool] = False
    """It holds a copy of the weights, which a transport brings after every update."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: int = -1
    """Sample from this many most probable tokens; -1 keeps all."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens after which a completion is cut off."""
    num_samples: int = Field(default=1, ge=1)
    """Completions per prompt; train.global_batch_size must be a multiple of it."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the end-of-sequence tokens of the model."""

    @property
    def starts_server(self) -> bool:
        """Whether the job starts and stops a server."""
        return False

    def student_problems(self, student: HfShapes) -> Iterator[str]:
        """Keys of the section that do not fit the student's sizes, one sentence each."""
        yield from ()

    @field_validator("top_k")
    @classmethod
    def _top_k_is_off_or_positive(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be -1 (off) or at least 1")
        return value

    @field_validator("stop")
    @classmethod
    def _stop_texts_are_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty text would stop every completion at once; remove it")
        return value


class MegatronRolloutConfig(BaseRolloutConfig):
    """The embedded engine: the student's own Megatron model generates; no server."""

    uses_student_model: ClassVar[bool] = True

    kind: Literal["megatron"] = "megatron"
    """The student's own Megatron model generates, without a server."""


class SglangRolloutConfig(BaseRolloutConfig):
    """SGLang generates over its HTTP API and receives the new weights after every iteration."""

    receives_weights: ClassVar[bool] = True

    kind: Literal["sglang"] = "sglang"
    """An SGLang server generates."""
    placement: Free[Literal["colocated", "external"]] = "colocated"
    """colocated: the job starts and stops the server; external: servers that already run at urls."""
    urls: Free[tuple[str, ...]] = ()
    """Addresses of external servers, such as http://10.0.0.5:30000; needed for placement external, refused
    otherwise."""
    api_key_env: Free[str | None] = None
    """Name of the environment variable with the key that external servers demand; servers that other machines reach
    must have one."""
    tensor_model_parallel_size: Free[int] = Field(default=1, ge=1)
    """Tensor-parallel size of a colocated server; independent of the student's."""
    start_timeout_s: Free[float] = Field(default=300.0, gt=0)
    """Seconds a colocated server may take until it answers."""
    request_timeout_s: Free[float] = Field(default=600.0, gt=0)
    """Seconds one request may take before it counts as failed."""
    max_retries: Free[int] = Field(default=2, ge=0)
    """Times a failed generation request is repeated before the engine counts as failed."""
    push_dir: Free[Path | None] = None
    """Folder through which weights reach the server; null: /dev/shm where it exists, else
    train.output_dir."""
    probe_tolerance: Free[float | None] = Field(default=None, gt=0)
    """Largest difference in log-probability (nats) between server and trainer after a weight push; null: 2e-4
    for fp32, 5e-2 for bf16."""
    mem_fraction_static: Free[float] = Field(default=0.4, gt=0, lt=1)
    """Share of the device memory that a colocated server takes for weights and KV cache."""
    num_threads: Free[int | None] = Field(default=None, ge=1)
    """CPU threads of a colocated server; null: all cores."""
    on_engine_failure: Free[Literal["stop"]] = "stop"
    """stop: save a checkpoint and end the run when the server fails."""

    @property
    @override
    def starts_server(self) -> bool:
        return self.placement == "colocated"

    @override
    def student_problems(self, student: HfShapes) -> Iterator[str]:
        tp = self.tensor_model_parallel_size
        if self.starts_server and student.num_attention_heads % tp:
            yield (
                f"rollout.tensor_model_parallel_size={tp} does not divide the student's "
                f"{student.num_attention_heads} attention heads"
            )

    @field_validator("urls")
    @classmethod
    def _urls_are_http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} must start with http:// or https://")
        return urls

    @model_validator(mode="after")
    def _urls_and_key_only_when_external(self) -> Self:
        if self.placement == "external" and not self.urls:
            raise ValueError("placement=external needs urls; list the servers or set placement=colocated")
        if self.placement == "colocated" and self.urls:
            raise ValueError(
                "urls are given but placement=colocated ignores them; set placement=external or remove urls"
            )
        if self.placement == "colocated" and self.api_key_env:
            raise ValueError(
                f"api_key_env={self.api_key_env!r} is for placement=external: the server of a colocated engine is open to this "
                "machine only; remove it"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_server_only_when_colocated(self) -> Self:
        """A resolved configuration names every key, so it is their values that tell whether they were given."""
        if self.placement == "colocated":
            return self
        defaults = {key: type(self).model_fields[key].default for key in _OF_COLOCATED_SERVERS}
        given = [f"{key}={getattr(self, key)}" for key in defaults if getattr(self, key) != defaults[key]]
        if given:
            raise ValueError(
                f"{', '.join(given)} would be ignored with placement=external: whoever starts the servers sets it there; remove "
                "it or set placement=colocated"
            )
        return self


RolloutConfig = Annotated[
    Annotated[SglangRolloutConfig, Tag("sglang")] | Annotated[MegatronRolloutConfig, Tag("megatron")],
    kind_discriminator("sglang"),
]
