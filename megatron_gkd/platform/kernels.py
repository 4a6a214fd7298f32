"""Which optional kernel libraries this machine offers to Megatron-Core."""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """Optional kernel libraries, and why each is or is not used.

    Attributes:
        transformer_engine: Build layers from Transformer Engine modules instead of plain torch ones.
        apex_gradient_fusion: Accumulate weight gradients inside Apex's GEMM.
        reason: One line for the log.
    """

    transformer_engine: bool
    apex_gradient_fusion: bool
    reason: str


def detect_kernels(*, on_cpu: bool) -> Kernels:
    """Transformer Engine and NVIDIA Apex where they are installed and a GPU is there to run them.

    The package called ``apex`` on the Python index is something else, so Apex counts only if its
    compiled ``fused_weight_gradient_mlp_cuda`` extension is importable.
    """
    if on_cpu:
        return Kernels(False, False, "plain torch kernels: no GPU")
    has_te = importlib.util.find_spec("transformer_engine") is not None
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    found = [name for name, there in (("Transformer Engine", has_te), ("Apex", has_apex)) if there]
    missing = [name for name, there in (("Transformer Engine", has_te), ("Apex", has_apex)) if not there]
    reason = f"found {', '.join(found) or 'none'}; not installed: {', '.join(missing) or 'none'}"
    return Kernels(has_te, has_apex, reason)
