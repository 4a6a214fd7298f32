"""Prompts, tokenizer and the values that travel from rollout to the loss."""

from megatron_gkd.data.prompts import PromptLoader, PromptSet, load_prompts
from megatron_gkd.data.sample import Batch, MicroBatch, Prompt, Sample
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
    "Prompt",
    "PromptLoader",
    "PromptSet",
    "Sample",
    "Tokenizer",
    "load_prompts",
    "load_tokenizer",
    "require_same_vocabulary",
    "tokenizer_fingerprint",
]
