"""The back end with a given name."""

from collections.abc import Callable

from megatron_gkd.losses.kernels.compiled import COMPILED
from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.platform.compiler import can_compile


def _compiled_if_possible() -> DenseKernels:
    return COMPILED if can_compile() else EAGER


FACTORIES: dict[str, Callable[[], DenseKernels]] = {
    "auto": lambda: EAGER,  # a run that is long enough for another one names it
    "eager": lambda: EAGER,
    "compiled": _compiled_if_possible,
}
"""Name -> what makes or finds the back end; called for every loss."""

BACKENDS = tuple(FACTORIES)


def find_kernels(name: str) -> DenseKernels:
    """The back end called ``name``; ``auto`` is ``eager``, and so is ``compiled`` where nothing can be compiled.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in FACTORIES:
        raise ValueError(f"unknown loss back end {name!r}; it is one of {', '.join(BACKENDS)}")
    return FACTORIES[name]()
