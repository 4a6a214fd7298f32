"""The back end with a given name."""

from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.kernels.triton_launch import TritonWherePossible

BACKENDS = ("auto", "eager", "triton")


def find_kernels(name: str) -> DenseKernels:
    """The back end called ``name``; ``auto`` is ``triton`` where that runs, else ``eager``.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown loss back end {name!r}; it is one of {', '.join(BACKENDS)}")
    return EAGER if name == "eager" else TritonWherePossible(required=name == "triton")
