"""Frequencies of the rotary position embedding, plain or scaled as in Llama 3.1 and later.

Megatron's own scaling knows one of the four numbers, so its frequencies are replaced.

Shapes: F = frequencies, half of a head's dimensions.
"""

import math

import torch
from torch import Tensor

from megatron_gkd.config.hf_shapes import HfShapes, Llama3Scaling


def rotary_frequencies(shapes: HfShapes) -> Tensor:
    """[F] radians per position, fp32, as transformers computes them."""
    exponent_F = torch.arange(0, shapes.head_dim, 2, dtype=torch.float32) / shapes.head_dim
    frequency_F = 1.0 / shapes.rope_theta**exponent_F
    return frequency_F if shapes.rope_scaling is None else _scale(frequency_F, shapes.rope_scaling)


def _scale(frequency_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long waves are stretched by ``factor``, short ones stay, and between them the frequency is a linear mixture."""
    waves_F = (
        scaling.original_max_position_embeddings * frequency_F / (2 * math.pi)
    )  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_F = ((waves_F - low) / (high - low)).clamp(0, 1)
    return kept_F * frequency_F + (1 - kept_F) * frequency_F / scaling.factor
