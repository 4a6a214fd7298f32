"""Which optional kernel libraries this machine offers to Megatron-Core."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gkd.config import ConfigError

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_ATTENTION = {"111": "auto", "100": "flash", "010": "fused", "001": "unfused", "000": "local"}


@dataclass(frozen=True)
class Kernels:
    """Optional kernel libraries, and why each is or is not used.

    Attributes:
        transformer_engine: Build layers from Transformer Engine modules instead of plain torch ones.
        apex_gradient_fusion: Accumulate weight gradients inside Apex's GEMM.
        reason: One line for the log.
        attention: Name of Megatron's attention back end.
    """

    transformer_engine: bool
    apex_gradient_fusion: bool
    reason: str
    attention: str = "auto"


def detect_kernels(*, on_cpu: bool) -> Kernels:
    """Transformer Engine and NVIDIA Apex where they are installed and a GPU is there to run them.

    The package called ``apex`` on the Python index is something else, so Apex counts only if its
    compiled ``fused_weight_gradient_mlp_cuda`` extension is importable.

    Raises:
        ConfigError: See ``attention_backend``.
    """
    attention = attention_backend(os.environ)
    if on_cpu:
        return Kernels(False, False, "plain torch kernels: no GPU", attention)
    has_te = importlib.util.find_spec("transformer_engine") is not None
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    found = [name for name, there in (("Transformer Engine", has_te), ("Apex", has_apex)) if there]
    missing = [name for name, there in (("Transformer Engine", has_te), ("Apex", has_apex)) if not there]
    reason = f"found {', '.join(found) or 'none'}; not installed: {', '.join(missing) or 'none'}; attention: {attention}"
    return Kernels(has_te, has_apex, reason, attention)


def attention_backend(environment: Mapping[str, str]) -> str:
    """The back end that Transformer Engine's variables ask for; each that is not set counts as 1.

    Megatron sets the same variables from its own setting and stops at one that differs, so the two must agree.

    Raises:
        ConfigError: The variables exclude one back end only, which Megatron cannot express.
    """
    values = [environment.get(name, "1") for name in ATTENTION_VARIABLES]
    if "".join(values) not in _ATTENTION:
        given = " ".join(f"{name}={value}" for name, value in zip(ATTENTION_VARIABLES, values, strict=True))
        raise ConfigError(
            f"{given} chooses no attention back end; set one of them to 1 and the others to 0, or all to 1 (automatic)"
        )
    return _ATTENTION["".join(values)]
