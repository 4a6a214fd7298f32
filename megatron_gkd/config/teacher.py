"""The teacher section: one class per kind.

Checks and trainer read the capabilities of a kind, never its name. A new kind is a class derived from
``BaseTeacherConfig`` and a line in ``TeacherConfig``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag, field_validator
from typing_extensions import override

from megatron_gkd.config.base import Config, Free, kind_discriminator
from megatron_gkd.config.model import ModelConfig


class BaseTeacherConfig(Config):
    """Capabilities of a teacher kind, and the checks of its own keys."""

    gives_signal: ClassVar[bool] = True
    """Scores sequences. Otherwise only the cross-entropy of the labels is trained."""
    gives_full_distribution: ClassVar[bool] = False
    """Returns the whole distribution at any temperature. Otherwise log-probabilities of some entries at temperature 1."""
    on_ranks: ClassVar[bool] = False
    """Runs as a model on the ranks of the job; the section then also derives from ``ModelConfig``."""

    @property
    def hf_folder(self) -> Path | None:
        """Folder with config.json and the tokenizer files; ``None`` without a model."""
        return None

    def vocabulary_problems(self, vocab_size: int) -> Iterator[str]:
        """Keys of the section that do not fit the teacher's vocabulary, one message each."""
        yield from ()


class MegatronTeacherConfig(ModelConfig, BaseTeacherConfig):
    """A Megatron model on the student's ranks, forward only, with its own layout."""

    gives_full_distribution: ClassVar[bool] = True
    on_ranks: ClassVar[bool] = True

    kind: Literal["megatron"] = "megatron"
    """A model on the student's ranks, with its exact distribution."""
    micro_batch_size: Free[int] = Field(default=4, ge=1)
    """Sequences that the teacher scores in one forward pass."""


class ServerTeacherConfig(BaseTeacherConfig):
    """An SGLang server started by launch/serve.py, which returns its top-k tokens."""

    kind: Literal["server"] = "server"
    """An SGLang server that returns its top-k log-probabilities."""
    hf: Path
    """Folder with config.json and the tokenizer files of the served model; the weights are not read."""
    server_ip: Free[str] = "127.0.0.1"
    """Address or host name of the server; launch/slurm/heterogeneous.sbatch sets it."""
    server_port: Free[int] = Field(default=30000, ge=1, le=65535)
    """Port of the server."""
    api_key_env: Free[str | None] = None
    """Environment variable with the server's API key; null: no key."""
    top_k: int = Field(default=64, ge=1)
    """Tokens whose log-probabilities the server returns at each position. With loss.support=teacher_top_k it replaces
    loss.top_k."""
    requests_in_flight: Free[int] = Field(default=8, ge=1)
    """Concurrent requests of each copy of the student, one sequence each."""
    request_timeout_s: Free[float] = Field(default=600.0, gt=0)
    """Timeout in seconds of one request; the teacher then counts as failed."""
    max_retries: Free[int] = Field(default=2, ge=0)
    """Retries of a request that could not connect or got an HTTP status of 500 or above."""

    @property
    @override
    def hf_folder(self) -> Path:
        return self.hf

    @property
    def url(self) -> str:
        """Base URL of the server."""
        host = f"[{self.server_ip}]" if ":" in self.server_ip else self.server_ip
        return f"http://{host}:{self.server_port}"

    @override
    def vocabulary_problems(self, vocab_size: int) -> Iterator[str]:
        if self.top_k > vocab_size:
            yield f"teacher.top_k={self.top_k} is above the teacher's vocab_size={vocab_size}; lower it"

    @field_validator("server_ip")
    @classmethod
    def _server_ip_is_a_host(cls, value: str) -> str:
        if not value or any(character in value for character in "/@ "):
            raise ValueError(
                f"{value!r} is not an address or a name such as 10.0.0.5; the port has its own key"
            )
        return value


class NoTeacherConfig(BaseTeacherConfig):
    """No teacher: supervised fine-tuning on the completions; needs loss.sft_weight=1."""

    gives_signal: ClassVar[bool] = False

    kind: Literal["none"] = "none"
    """No teacher, only cross-entropy."""


TeacherConfig = Annotated[
    Annotated[MegatronTeacherConfig, Tag("megatron")]
    | Annotated[ServerTeacherConfig, Tag("server")]
    | Annotated[NoTeacherConfig, Tag("none")],
    kind_discriminator("megatron"),
]
