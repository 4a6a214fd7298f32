"""The back end with a given name."""

from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.kernels.interface import DenseKernels

BACKENDS = ("auto", "eager")


def find_kernels(name: str) -> DenseKernels:
    """The back end called ``name``; ``auto`` is ``eager``.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown loss back end {name!r}; it is one of {', '.join(BACKENDS)}")
    return EAGER
