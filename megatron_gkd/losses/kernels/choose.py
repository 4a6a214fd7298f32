"""The back end with a given name."""

from collections.abc import Callable

from megatron_gkd.losses.kernels.compiled import COMPILED
from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.kernels.triton_launch import TritonWherePossible
from megatron_gkd.platform.compiler import can_compile


def _compiled_if_possible() -> DenseKernels:
    return COMPILED if can_compile() else EAGER


FACTORIES: dict[str, Callable[[], DenseKernels]] = {
    "auto": lambda: TritonWherePossible(required=False),
    "eager": lambda: EAGER,
    "compiled": _compiled_if_possible,
    "triton": lambda: TritonWherePossible(required=True),
}
"""Name -> what makes or finds the back end; called for every loss. A run that is long enough to compile names that."""

BACKENDS = tuple(FACTORIES)


def find_kernels(name: str) -> DenseKernels:
    """The back end called ``name``.

    ``auto`` is ``triton`` for logits on a GPU, else ``eager``; ``compiled`` is ``eager`` where nothing can be compiled.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in FACTORIES:
        raise ValueError(f"unknown loss back end {name!r}; it is one of {', '.join(BACKENDS)}")
    return FACTORIES[name]()
