"""Detection of the optional kernel libraries of Megatron-Core."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gkd.config import ConfigError

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_ATTENTION = {"111": "auto", "100": "flash", "010": "fused", "001": "unfused", "000": "local"}


@dataclass(frozen=True)
class Kernels:
    """Optional kernel libraries to use.

    Attributes:
        transformer_engine: Build layers from Transformer Engine modules instead of plain torch modules.
        apex_gradient_fusion: Accumulate weight gradients in Apex's GEMM.
        reason: What was found, for the log.
        attention: Name of a Megatron ``AttnBackend``.
    """

    transformer_engine: bool
    apex_gradient_fusion: bool
    reason: str
    attention: str = "auto"


def detect_kernels(*, on_cpu: bool) -> Kernels:
    """Detect Transformer Engine and NVIDIA Apex; neither is used on a CPU.

    Raises:
        ConfigError: The NVTE attention variables select no back end, see ``attention_backend``.
    """
    attention = attention_backend(os.environ)
    if on_cpu:
        return Kernels(False, False, "plain torch kernels: no GPU", attention)
    has_te = importlib.util.find_spec("transformer_engine") is not None
    # the package ``apex`` on PyPI is another project, so look for the compiled extension that Megatron calls
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    found = [name for name, there in (("Transformer Engine", has_te), ("Apex", has_apex)) if there]
    missing = [name for name, there in (("Transformer Engine", has_te), ("Apex", has_apex)) if not there]
    reason = f"found {', '.join(found) or 'none'}; not installed: {', '.join(missing) or 'none'}; attention: {attention}"
    return Kernels(has_te, has_apex, reason, attention)


def attention_backend(environment: Mapping[str, str]) -> str:
    """Name of the attention back end selected by Transformer Engine's variables (unset counts as 1).

    Raises:
        ConfigError: The variables exclude exactly one back end, which Megatron cannot express.
    """
    # Megatron sets these variables from its attention_backend and asserts that a variable that is set agrees
    # (language_module.py:104, 0.16.1), so its setting has to follow the user's variables
    values = [environment.get(name, "1") for name in ATTENTION_VARIABLES]
    if "".join(values) not in _ATTENTION:
        given = " ".join(f"{name}={value}" for name, value in zip(ATTENTION_VARIABLES, values, strict=True))
        raise ConfigError(
            f"{given} selects no attention back end; set one of them to 1 and the others to 0, or all to 1 (automatic)"
        )
    return _ATTENTION["".join(values)]
