"""The teacher section: one class per kind; its capabilities are what checks and trainer read, never its name.

A further kind is a class over ``BaseTeacherConfig`` and a line in ``TeacherConfig``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag, field_validator
from typing_extensions import override

from megatron_gkd.config.base import Config, Free, kind_discriminator
from megatron_gkd.config.model import ModelConfig


class BaseTeacherConfig(Config):
    """Capabilities of a kind of teacher, and its checks of its own keys."""

    gives_signal: ClassVar[bool] = True
    """It scores sequences; without, only the cross-entropy of the labels is trained."""
    gives_full_distribution: ClassVar[bool] = False
    """It gives logits over the whole vocabulary, not only log-probabilities of some entries at temperature 1."""
    on_ranks: ClassVar[bool] = False
    """It is a model on the ranks of the job; the section is then a ``ModelConfig``, too."""

    @property
    def hf_folder(self) -> Path | None:
        """Folder with config.json and the tokenizer files; ``None`` without a model."""
        return None

    def vocabulary_problems(self, vocab_size: int) -> Iterator[str]:
        """Keys of the section that do not fit the teacher's vocabulary, one sentence each."""
        yield from ()


class MegatronTeacherConfig(ModelConfig, BaseTeacherConfig):
    """A Megatron model on the student's ranks, forward only, in a layout of its own."""

    gives_full_distribution: ClassVar[bool] = True
    on_ranks: ClassVar[bool] = True

    kind: Literal["megatron"] = "megatron"
    """A model on the student's ranks, with its exact distribution."""
    micro_batch_size: Free[int] = Field(default=4, ge=1)
    """Sequences that the teacher scores in one forward pass."""


class ServerTeacherConfig(BaseTeacherConfig):
    """An SGLang server, started by launch/serve.py, that returns its most probable tokens."""

    kind: Literal["server"] = "server"
    """An SGLang server that returns its top-k log-probabilities."""
    hf: Path
    """Folder with config.json and the tokenizer files of the served model; its weights are not read here."""
    server_ip: Free[str] = "127.0.0.1"
    """Address or name of the machine that the server runs on; launch/slurm/heterogeneous.sbatch fills it in."""
    server_port: Free[int] = Field(default=30000, ge=1, le=65535)
    """Port that the server listens on."""
    api_key_env: Free[str | None] = None
    """Environment variable that holds the server's API key; null: the server demands none."""
    top_k: int = Field(default=64, ge=1)
    """Most probable tokens that the server tells at every position, with their log-probabilities; goes with
    loss.support=teacher_top_k, where loss.top_k has no say."""
    requests_in_flight: Free[int] = Field(default=8, ge=1)
    """Sequences that each copy of the student asks about at the same time."""
    request_timeout_s: Free[float] = Field(default=600.0, gt=0)
    """Seconds one request, which is about one sequence, may take before the teacher counts as failed."""
    max_retries: Free[int] = Field(default=2, ge=0)
    """Times a request is repeated that could not connect or got an answer of 500 and above."""

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
    """No teacher: supervised fine-tuning on the completions, with loss.sft_weight=1."""

    gives_signal: ClassVar[bool] = False

    kind: Literal["none"] = "none"
    """No teacher: only the cross-entropy of loss.sft_weight=1 is trained."""


TeacherConfig = Annotated[
    Annotated[MegatronTeacherConfig, Tag("megatron")]
    | Annotated[ServerTeacherConfig, Tag("server")]
    | Annotated[NoTeacherConfig, Tag("none")],
    kind_discriminator("megatron"),
]
