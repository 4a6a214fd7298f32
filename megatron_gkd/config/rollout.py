"""The rollout section: one class per kind of generation engine, with common sampling keys.

Checks and trainer read the capabilities of a kind, never its name. A new kind is a class derived from
``BaseRolloutConfig`` and a line in ``RolloutConfig``.
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
    """Sampling keys, capabilities of an engine kind, and the checks of its own keys."""

    uses_student_model: ClassVar[bool] = False
    """Generates with the student's own layers, on its ranks and in its layout."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with at least this probability; 1: off."""
    top_k: int = -1
    """Sample from the k most probable tokens; -1: off."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest completion in tokens."""
    num_samples: int = Field(default=1, ge=1)
    """Completions per prompt; train.global_batch_size must be a multiple of it."""
    stop: tuple[str, ...] = ()
    """Stop strings, in addition to the end-of-sequence tokens of the model."""

    @property
    def starts_server(self) -> bool:
        """Whether the job starts and stops a server."""
        return False

    def student_problems(self, student: HfShapes) -> Iterator[str]:
        """Keys of the section that do not fit the student's sizes, one message each."""
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
    """The embedded engine: the student's own Megatron model generates, without a server."""

    uses_student_model: ClassVar[bool] = True

    kind: Literal["megatron"] = "megatron"
    """The embedded engine."""


class SglangRolloutConfig(BaseRolloutConfig):
    """SGLang over its HTTP API; it receives the new weights after every update."""

    kind: Literal["sglang"] = "sglang"
    """SGLang servers."""
    placement: Free[Literal["colocated", "external"]] = "colocated"
    """colocated: the job starts and stops a server; external: servers already run at urls."""
    urls: Free[tuple[str, ...]] = ()
    """Base URLs of external servers, such as http://10.0.0.5:30000; required with placement=external, an error
    otherwise."""
    api_key_env: Free[str | None] = None
    """Environment variable with the API key of external servers; servers reachable from other machines must have one."""
    tensor_model_parallel_size: Free[int] = Field(default=1, ge=1)
    """Tensor-parallel size of a colocated server; independent of the student's."""
    start_timeout_s: Free[float] = Field(default=300.0, gt=0)
    """Seconds until a colocated server must be ready."""
    request_timeout_s: Free[float] = Field(default=600.0, gt=0)
    """Timeout in seconds of one request."""
    max_retries: Free[int] = Field(default=2, ge=0)
    """Retries of a generation request before the engine counts as failed."""
    push_dir: Free[Path | None] = None
    """Folder for the weights that the server loads; null: /dev/shm if it exists, else train.output_dir."""
    probe_tolerance: Free[float | None] = Field(default=None, gt=0)
    """Largest difference in log-probability (nats) between server and trainer after a weight push; null: 2e-4 for fp32,
    5e-2 for bf16."""
    mem_fraction_static: Free[float] = Field(default=0.4, gt=0, lt=1)
    """Share of the device memory for weights and KV cache of a colocated server."""
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
                f"api_key_env={self.api_key_env!r} is for placement=external: a colocated server accepts connections of this "
                "machine only; remove it"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_server_only_when_colocated(self) -> Self:
        # a resolved configuration holds every key, so only a value other than the default shows that it was given
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
