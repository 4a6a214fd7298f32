"""Prompt files, tokenizers, and the samples and batches made from them."""

from megatron_gkd.data.prompts import PromptSet, RowPolicy, load_prompts
from megatron_gkd.data.row_files import open_row_files
from megatron_gkd.data.rows import RowEncoder, RowKeys, RowLimits
from megatron_gkd.data.sample import Batch, MicroBatch, Prompt, Sample
from megatron_gkd.data.streams import MixedPrompts, PromptLoader, PromptStream, StreamedPrompts
from megatron_gkd.data.tokenizer import (
    DataError,
    Tokenizer,
    load_tokenizer,
    require_same_vocabulary,
    tokenizer_fingerprint,
)

__all__ = [
    "Batch",
    "DataError",
    "MicroBatch",
    "MixedPrompts",
    "Prompt",
    "PromptLoader",
    "PromptSet",
    "PromptStream",
    "RowEncoder",
    "RowKeys",
    "RowLimits",
    "RowPolicy",
    "Sample",
    "StreamedPrompts",
    "Tokenizer",
    "load_prompts",
    "load_tokenizer",
    "open_row_files",
    "require_same_vocabulary",
    "tokenizer_fingerprint",
]
