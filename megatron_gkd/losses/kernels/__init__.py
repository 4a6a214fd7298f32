"""The passes over logits that a loss consists of, in several back ends: all of the arithmetic, none of the collectives."""

from megatron_gkd.losses.kernels.choose import BACKENDS, find_kernels
from megatron_gkd.losses.kernels.interface import DenseKernels

__all__ = ["BACKENDS", "DenseKernels", "find_kernels"]
