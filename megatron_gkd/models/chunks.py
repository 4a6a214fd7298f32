"""A rank's part of a model when the interleaved schedule gives it several chunks of layers that lie apart."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel


class ModelChunks(torch.nn.ModuleList):
    """The chunks of one rank, from input to output, behind what the rest of the program asks of a single GPTModel.

    Names of parameters start with the chunk's number, here as in ``reshard.layout``.
    """

    @property
    def config(self) -> Any:
        """The ``TransformerConfig`` that all chunks share."""
        return chunks_of(self)[0].config

    @property
    def vocab_size(self) -> int:
        """Vocabulary rows after padding, over all tensor-parallel ranks."""
        return chunks_of(self)[0].vocab_size

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """As ``GPTModel.sharded_state_dict``: in the checkpoint, layers have their global numbers."""
        return {
            f"{i}.{name}": value
            for i, chunk in enumerate(chunks_of(self))
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
        }


LocalModel = GPTModel | ModelChunks
"""What a rank holds of a model."""


def chunks_of(model: LocalModel) -> list[GPTModel]:
    """All chunks; a GPTModel is its own only one."""
    chunks: Any = list(model) if isinstance(model, ModelChunks) else [model]
    return chunks
