"""One small file of weight names per model family."""

from megatron_gkd.models.families.base import Family, WeightMap
from megatron_gkd.models.families.llama import LLAMA
from megatron_gkd.models.families.qwen2 import QWEN2
from megatron_gkd.models.families.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "Family", "WeightMap", "family_of"]


def family_of(model_type: str) -> Family:
    """The family of a ``config.json``'s ``model_type``.

    Raises:
        ValueError: No family of that name; the message lists the known ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
