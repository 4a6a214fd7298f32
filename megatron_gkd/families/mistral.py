"""Mistral: Llama, with attention that may reach back over a window only."""

from megatron_gkd.families.base import Family
from megatron_gkd.families.llama import LAYER, OUTER

MISTRAL = Family("mistral", LAYER, OUTER, default_sliding_window=4096)
