"""Supported model families, one file each. Torch-free, because config reads them."""

from megatron_gkd.families.base import Family, WeightMap
from megatron_gkd.families.llama import LLAMA
from megatron_gkd.families.mistral import MISTRAL
from megatron_gkd.families.qwen2 import QWEN2
from megatron_gkd.families.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "Family", "WeightMap", "family_of"]


def family_of(model_type: str) -> Family:
    """Return the family for a ``model_type`` of config.json.

    Raises:
        ValueError: Unknown model type; the message lists the supported ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
