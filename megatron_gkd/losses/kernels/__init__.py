"""Passes over the logits of both models, in several back ends: all of the arithmetic, none of the collectives."""

from megatron_gkd.losses.divergences import Divergence
from megatron_gkd.losses.kernels.compiled import CompiledKernels
from megatron_gkd.losses.kernels.eager import EagerKernels
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.kernels.triton import TritonKernels
from megatron_gkd.losses.vocab_parallel import Temperatures
from megatron_gkd.platform.compiler import can_compile, can_use_triton

BACKENDS = ("auto", "eager", "compiled", "triton")


def make_kernels(
    backend: str, divergence: Divergence, temperatures: Temperatures, rows_per_pass: int | None = None
) -> DenseKernels:
    """The kernels of a back end for one divergence.

    Args:
        backend: One of ``BACKENDS``. ``auto`` is ``triton`` for logits on a GPU, else ``eager``; ``compiled`` is
            ``eager`` where nothing can be compiled. A long run names ``compiled`` itself.
        divergence: What the passes compute.
        temperatures: Divisors of the logits.
        rows_per_pass: Rows of one pass of ``eager`` and ``compiled``; ``None``: chosen from the shapes.

    Raises:
        ValueError: If there is no back end of this name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown loss back end {backend!r}; it is one of {', '.join(BACKENDS)}")
    eager = EagerKernels(divergence, temperatures, rows_per_pass)
    if backend == "compiled" and can_compile():
        return CompiledKernels(divergence, temperatures, rows_per_pass, eager=eager)
    if backend == "triton" or (backend == "auto" and can_use_triton()):
        is_required = backend == "triton"
        return TritonKernels(divergence, temperatures, rows_per_pass, eager=eager, is_required=is_required)
    return eager
