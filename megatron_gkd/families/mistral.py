"""Mistral: Llama with sliding-window attention."""

from megatron_gkd.families.base import Family
from megatron_gkd.families.llama import LAYER, OUTER

# Built with full attention, which is the same up to the window; longer sequences are refused. 4096 is transformers' default.
MISTRAL = Family("mistral", LAYER, OUTER, default_sliding_window=4096)
