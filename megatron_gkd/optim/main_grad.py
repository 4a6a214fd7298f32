"""Add a gradient to Megatron's own sum of it, without a copy in between.

Megatron's DDP keeps the sum of a parameter's gradients over micro-batches in ``parameter.main_grad``, float32. A hook on
the parameter adds ``parameter.grad`` to it after each backward pass, and starts the sum over ranks if all is there. A
product that has added to ``main_grad`` by itself sets ``grad_added_to_main_grad``: the hook then drops ``parameter.grad``,
unless ``zero_out_wgrad`` says that another layer uses the same parameter (the embedding of a tied model in one stage).

Shapes: V = vocabulary entries held by this rank, H = hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def main_grad_adder(parameter: Tensor) -> Callable[[Tensor, Tensor], Tensor | None] | None:
    """``add(grad_VH, factor)`` for the backward pass of a parameter under DDP; ``None`` for any other one.

    ``add`` returns what the backward pass is to give to autograd in the gradient's place. ``grad_VH`` is contiguous, in
    the format of ``main_grad``, and not to be used afterwards.
    """
    megatron: Any = parameter
    main_grad_VH = getattr(megatron, "main_grad", None)
    if main_grad_VH is None or main_grad_VH.dtype != torch.float32 or parameter.element_size() > 4:
        return None

    def add(grad_VH: Tensor, factor: Tensor) -> Tensor | None:
        megatron.main_grad.addcmul_(grad_VH, factor)
        if getattr(megatron, "zero_out_wgrad", False):
            # the embedding's gradient comes later in the same pass, and the hook runs with that: once, and adds it
            return None
        megatron.grad_added_to_main_grad = True
        # with overlap_grad_reduce the hook refuses None; what it drops may lie where the gradient was
        return grad_VH.flatten().view(parameter.dtype)[: parameter.numel()].view_as(parameter)

    return add
