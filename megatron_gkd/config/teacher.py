"""The teacher section: a Megatron model on the student's ranks, an SGLang server behind a port, or none."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Tag, field_validator

from megatron_gkd.config.base import Config, kind_discriminator
from megatron_gkd.config.model import ModelConfig


class MegatronTeacherConfig(ModelConfig):
    """The model that is imitated; it runs forward only, in a layout of its own on the student's ranks."""

    kind: Literal["megatron"] = "megatron"
    """megatron: a model on the student's ranks, exact; server: an SGLang server that tells its top_k; none: no teacher, only
    the cross-entropy of loss.sft_weight=1."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences that the teacher scores in one forward pass."""


class ServerTeacherConfig(Config):
    """The model that is imitated is served by SGLang, started by launch/serve.py, and tells its most probable tokens."""

    kind: Literal["server"] = "server"
    """megatron: a model on the student's ranks, exact; server: an SGLang server that tells its top_k; none: no teacher, only
    the cross-entropy of loss.sft_weight=1."""
    hf: Path
    """Folder with config.json and the tokenizer files of the served model; its weights are not read here."""
    server_ip: str = "127.0.0.1"
    """Address or name of the machine that the server runs on; launch/slurm/heterogeneous.sbatch fills it in."""
    server_port: int = Field(default=30000, ge=1, le=65535)
    """Port that the server listens on."""
    api_key_env: str | None = None
    """Environment variable that holds the server's API key; null: the server demands none."""
    top_k: int = Field(default=64, ge=1)
    """Most probable tokens that the server tells at every position, with their log-probabilities; goes with
    loss.support=teacher_top_k, where loss.top_k has no say."""
    requests_in_flight: int = Field(default=8, ge=1)
    """Sequences that each copy of the student asks about at the same time."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds one request, which is about one sequence, may take before the teacher counts as failed."""
    max_retries: int = Field(default=2, ge=0)
    """Times a request is repeated that could not connect or got an answer of 500 and above."""

    @property
    def hf_folder(self) -> Path:
        """Folder that holds config.json and the tokenizer files."""
        return self.hf

    @property
    def url(self) -> str:
        """Where the server is."""
        host = f"[{self.server_ip}]" if ":" in self.server_ip else self.server_ip
        return f"http://{host}:{self.server_port}"

    @field_validator("server_ip")
    @classmethod
    def _server_ip_is_a_host(cls, value: str) -> str:
        if not value or any(character in value for character in "/@ "):
            raise ValueError(
                f"{value!r} is not an address or a name such as 10.0.0.5; the port has its own key"
            )
        return value


class NoTeacherConfig(Config):
    """No teacher: supervised fine-tuning on the completions, with loss.sft_weight=1."""

    kind: Literal["none"] = "none"
    """megatron: a model on the student's ranks, exact; server: an SGLang server that tells its top_k; none: no teacher, only
    the cross-entropy of loss.sft_weight=1."""


TeacherConfig = Annotated[
    Annotated[MegatronTeacherConfig, Tag("megatron")]
    | Annotated[ServerTeacherConfig, Tag("server")]
    | Annotated[NoTeacherConfig, Tag("none")],
    kind_discriminator("megatron"),
]
