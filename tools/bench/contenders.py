"""The losses that the bench measures: ours, and three as they are published.

A contender is called with this rank's logits [T, V] of student and teacher and returns (sum of the loss over tokens,
gradient of the student's logits). From hidden states: with (hidden, head) of both.

Shapes: T = tokens, V = vocabulary entries held by this rank.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.losses import distill_loss, linear_distill_loss

Outcome = tuple[Tensor, Tensor]


class Contender(NamedTuple):
    """A loss and its implementation."""

    name: str
    divergence: str
    make: Callable[[int], Callable[..., Outcome]]  # of the tensor-parallel size


def ours(divergence: str, backend: str = "compiled") -> Contender:
    """Gradient in the forward, in the storage of the given logits."""

    def make(tp_size: int) -> Callable[..., Outcome]:
        group = dist.group.WORLD if tp_size > 1 else None

        def run(student_TV: Tensor, teacher_TV: Tensor) -> Outcome:
            total, _ = distill_loss(
                student_TV,
                teacher_TV,
                divergence=divergence,
                group=group,
                backend=backend,
                token_weight_T=torch.ones(len(student_TV)),
                overwrite_logits=True,
            )
            (grad_TV,) = torch.autograd.grad(total, student_TV)
            return total.detach(), grad_TV

        return run

    return Contender(f"ours, {backend}", divergence, make)


def trl() -> Contender:
    """Both logits gathered over the group, then the loss of TRL's GKDTrainer."""

    def make(tp_size: int) -> Callable[..., Outcome]:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
        from trl.experimental.gkd.gkd_trainer import GKDTrainer  # pyright: ignore[reportMissingImports]

        group: Any = dist.group.WORLD

        def run(student_TV: Tensor, teacher_TV: Tensor) -> Outcome:
            whole, target = student_TV, teacher_TV
            if tp_size > 1:
                whole = gather_from_tensor_model_parallel_region(student_TV, group=group)
                with torch.no_grad():
                    target = gather_from_tensor_model_parallel_region(teacher_TV, group=group)
            total = GKDTrainer.generalized_jsd_loss(whole, target, beta=0.5, reduction="sum")
            (grad_TV,) = torch.autograd.grad(total, student_TV)
            return total.detach(), grad_TV

        return run

    return Contender("gather + TRL", "jsd", make)


def modelopt() -> Contender:
    """NVIDIA ModelOpt's loss for Megatron, with its own collectives; the value is summed over ranks as Megatron does."""

    def make(tp_size: int) -> Callable[..., Outcome]:
        from megatron.core import parallel_state
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss  # pyright: ignore[reportMissingImports]

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tp_size)
        config: Any = SimpleNamespace(tensor_model_parallel_size=tp_size, sequence_parallel=False)
        loss = LogitsKLLoss(config)

        def run(student_TV: Tensor, teacher_TV: Tensor) -> Outcome:
            loss_BS, _, _ = loss(student_TV.unsqueeze(1), teacher_TV.unsqueeze(1))
            total = loss_BS.sum()
            (grad_TV,) = torch.autograd.grad(total, student_TV)
            value = total.detach()
            if tp_size > 1:
                dist.all_reduce(value)
            return value, grad_TV

        return run

    return Contender("ModelOpt", "forward_kl", make)


def ours_from_hidden() -> Contender:
    """The training path: hidden states and output layers, gradients of both."""

    def make(tp_size: int) -> Callable[..., Outcome]:
        def run(student_TH: Tensor, head_VH: Tensor, teacher_TH: Tensor, teacher_VH: Tensor) -> Outcome:
            total, _ = linear_distill_loss(
                student_TH,
                head_VH,
                teacher_TH,
                teacher_VH,
                divergence="jsd",
                backend="compiled",
                token_weight_T=torch.ones(len(student_TH)),
            )
            grads = torch.autograd.grad(total, (student_TH, head_VH))
            return total.detach(), grads[0]

        return run

    return Contender("ours, compiled", "jsd", make)


def liger() -> Contender:
    """Liger-Kernel's chunked JSD with its defaults; it knows no tensor parallelism."""

    def make(tp_size: int) -> Callable[..., Outcome]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)

        def run(student_TH: Tensor, head_VH: Tensor, teacher_TH: Tensor, teacher_VH: Tensor) -> Outcome:
            num_tokens = len(student_TH)
            labels_T = torch.zeros(num_tokens, dtype=torch.int64)
            total = (
                loss(student_TH, head_VH, teacher_TH, teacher_VH, labels_T) * num_tokens
            )  # it returns the mean
            grads = torch.autograd.grad(total, (student_TH, head_VH))
            return total.detach(), grads[0]

        return run

    return Contender("Liger-Kernel", "jsd", make)
