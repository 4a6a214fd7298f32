"""Keys shared by the student and a Megatron teacher: the source of a model and its layout."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from megatron_gkd.config.base import Config, Free


class ParallelConfig(Config):
    """Layout of one copy of a model; the remaining ranks hold further copies (data parallel)."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer; each holds a shard of the weight matrices and of the vocabulary."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Pipeline stages; each holds the same number of layers."""
    sequence_parallel: bool = False
    """Also shard the activations of norms and dropout along the sequence; needs tensor_model_parallel_size > 1."""

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> Self:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel=true needs tensor_model_parallel_size > 1 (it is 1); "
                "raise it or set sequence_parallel=false"
            )
        return self


class ModelConfig(Config):
    """Source of a model and its layout."""

    hf: Path | None = None
    """Folder in Hugging Face format: config.json, safetensors and tokenizer files. Give this or checkpoint."""
    checkpoint: Path | None = None
    """Folder written by tools/convert_hf_to_megatron.py, or a training checkpoint iter_<n>. Give this or hf."""
    parallel: Free[ParallelConfig] = ParallelConfig()

    @property
    def hf_folder(self) -> Path:
        """Folder with config.json and the tokenizer files, for either source."""
        if self.hf is not None:
            return self.hf
        assert self.checkpoint is not None  # _exactly_one_source
        return self.checkpoint / "hf"

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        if self.hf is None and self.checkpoint is None:
            raise ValueError("give exactly one of hf and checkpoint; neither is given")
        if self.hf is not None and self.checkpoint is not None:
            raise ValueError(
                f"give exactly one of hf and checkpoint; hf={str(self.hf)!r} and "
                f"checkpoint={str(self.checkpoint)!r} are both given, set one to null"
            )
        return self
