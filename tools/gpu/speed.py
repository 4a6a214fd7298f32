"""Stages that measure time and memory: products, kernels, and the loss from hidden states.

Shapes: T = tokens, V = vocabulary, H = hidden size, K = known entries, C = tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.losses import linear_cross_entropy, linear_distill_loss, linear_top_k_distill_loss
from megatron_gkd.platform.products import matmul_into
from tools.bench.kernels import passes
from tools.gpu.machine import Machine
from tools.gpu.report import StageReport

_CHUNK = 1024


def gemm(machine: Machine, report: StageReport) -> None:
    """Time of the loss's products: the floor of the loss, the price of odd vocabularies and small chunks."""
    hidden_size = 64 if machine.is_smoke else 2048
    for vocab in (machine.vocab_size, machine.odd_vocab_size):
        head_VH = machine.randn(vocab, hidden_size, dtype=torch.bfloat16)
        head_grad_VH = torch.zeros(vocab, hidden_size, device=machine.device)
        for tokens in (256, 1024, 2048):
            hidden_CH = machine.randn(tokens, hidden_size, dtype=torch.bfloat16)
            grad_CV = machine.randn(tokens, vocab, dtype=torch.bfloat16)
            logits_CV = torch.empty(tokens, vocab, device=machine.device)
            hidden_grad_CH = torch.empty(tokens, hidden_size, device=machine.device)
            runs: dict[str, Callable[[], None]] = {
                "logits": partial(matmul_into, logits_CV, hidden_CH, head_VH.t()),
                "hidden gradient": partial(matmul_into, hidden_grad_CH, grad_CV, head_VH),
                "head gradient +=": partial(matmul_into, head_grad_VH, grad_CV.t(), hidden_CH, add=True),
            }
            flop = 2 * tokens * vocab * hidden_size
            for name, run in runs.items():
                ms = machine.median_ms(run, repeats=5)
                label = f"{name}, {vocab} entries, {tokens} tokens"
                report.measured(label, ms, "ms")
                report.measured(f"{label}: rate", flop / ms / 1e9, "TFLOP/s")


def kernels(machine: Machine, report: StageReport) -> None:
    """Bandwidth of every pass over logits as a fraction of a copy's."""
    backend = "eager" if machine.is_smoke else "triton"
    sizes = ((256, machine.vocab_size), (1024, machine.vocab_size), (1024, machine.odd_vocab_size))
    for dtype, (tokens, vocab) in product((torch.float32, torch.bfloat16), sizes):
        student_TV = machine.randn(tokens, vocab, dtype=dtype)
        teacher_TV = student_TV + torch.randn_like(student_TV) / 3
        copy_rate = None
        for name, num_reads_and_writes, run in passes(student_TV, teacher_TV, backend):
            ms = machine.median_ms(run, repeats=10, warmup=2)
            rate = num_reads_and_writes * student_TV.nbytes / ms / 1e6
            copy_rate = copy_rate or rate
            label = f"{name}, {str(dtype).removeprefix('torch.')} [{tokens}, {vocab}]"
            report.measured(label, rate, "GB/s")
            report.measured(f"{label}: share", rate / copy_rate, "of a copy's bandwidth")


def linear(machine: Machine, report: StageReport) -> None:
    """Time and peak of the training path at the size of Qwen3-1.7B under Qwen3-8B, beside Liger-Kernel."""
    inputs = _Inputs(machine)
    for chunk, divergence in product((256, 512, 1024, 2048, 4096), ("forward_kl", "jsd")):
        _measure(report, inputs, f"{divergence}, chunk {chunk}", inputs.distill(divergence, chunk))
    with_labels = inputs.distill("jsd", _CHUNK, labels_T=inputs.labels_T, sft_weight=0.3)
    _measure(report, inputs, f"jsd + sft, chunk {_CHUNK}", with_labels)
    _measure(report, inputs, f"top-64 of a server, chunk {_CHUNK}", inputs.served)
    _measure(report, inputs, f"cross-entropy, chunk {_CHUNK}", inputs.cross_entropy)
    _forbid_syncs(report, inputs)
    _measure_liger(report, inputs)


Loss = Callable[[Tensor, Tensor], Any]
"""(student hidden, student head) -> (weighted sum to differentiate, ...)."""


class _Inputs:
    """Hidden states, heads, labels and a server's reply, bfloat16."""

    def __init__(self, machine: Machine):
        num_tokens, hidden, teacher_hidden = (64, 32, 64) if machine.is_smoke else (8192, 2048, 4096)
        vocab, half = machine.vocab_size, torch.bfloat16
        self.machine = machine
        self.student_TH = machine.randn(num_tokens, hidden, dtype=half)
        self.student_VH = (machine.randn(vocab, hidden) / hidden**0.5).to(half)
        self.teacher_TH = machine.randn(num_tokens, teacher_hidden, dtype=half)
        self.teacher_VH = (machine.randn(vocab, teacher_hidden) / teacher_hidden**0.5).to(half)
        self.weight_T = torch.ones(num_tokens, device=machine.device)
        self.labels_T = torch.randint(vocab, (num_tokens,), device=machine.device)
        # one id in each of 64 equal ranges: a row has no id twice
        width = vocab // 64
        within_TK = torch.randint(width, (num_tokens, 64), device=machine.device)
        self.ids_TK = within_TK + torch.arange(64, device=machine.device) * width
        self.log_probs_TK = machine.randn(num_tokens, 64).log_softmax(-1) - 0.1

    def distill(self, divergence: str, tokens_per_chunk: int, **options: Any) -> Loss:
        """A divergence from the teacher's hidden states."""
        return lambda hidden_TH, head_VH: linear_distill_loss(
            hidden_TH,
            head_VH,
            self.teacher_TH,
            self.teacher_VH,
            divergence=divergence,
            token_weight_T=self.weight_T,
            tokens_per_chunk=tokens_per_chunk,
            **options,
        )

    def served(self, hidden_TH: Tensor, head_VH: Tensor) -> Any:
        """Forward KL on the entries that a server has sent."""
        return linear_top_k_distill_loss(
            hidden_TH,
            head_VH,
            self.ids_TK,
            self.log_probs_TK,
            divergence="forward_kl",
            token_weight_T=self.weight_T,
            tokens_per_chunk=_CHUNK,
        )

    def cross_entropy(self, hidden_TH: Tensor, head_VH: Tensor) -> Any:
        """Cross-entropy with the labels."""
        return linear_cross_entropy(
            hidden_TH, head_VH, self.labels_T, token_weight_T=self.weight_T, tokens_per_chunk=_CHUNK
        )

    def forward_backward(self, loss: Loss) -> None:
        """Value and both gradients, which are dropped."""
        hidden_TH, head_VH = (x.detach().requires_grad_() for x in (self.student_TH, self.student_VH))
        loss(hidden_TH, head_VH)[0].backward()


def _measure(report: StageReport, inputs: _Inputs, name: str, loss: Loss) -> None:
    run = partial(inputs.forward_backward, loss)
    run()  # compiles
    peak = inputs.machine.peak_gib(run)
    report.measured(name, inputs.machine.median_ms(run, repeats=3), "ms")
    if not inputs.machine.is_smoke:
        report.measured(f"{name}: peak", peak, "GiB beyond the inputs")


def _forbid_syncs(report: StageReport, inputs: _Inputs) -> None:
    """The forward must queue its kernels without waiting for the device."""
    if inputs.machine.is_smoke:
        report.measured("host syncs in the forward", "not measured on a CPU")
        return
    hidden_TH, head_VH = (x.detach().requires_grad_() for x in (inputs.student_TH, inputs.student_VH))
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.distill("jsd", _CHUNK)(hidden_TH, head_VH)
        found = ""
    except RuntimeError as error:
        found = str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report.holds("host syncs in the forward", not found, found or "none")


def _measure_liger(report: StageReport, inputs: _Inputs) -> None:
    try:
        from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSDLoss,
        )
    except ImportError:
        report.measured("Liger-Kernel, jsd", "not installed (liger-kernel 0.8.5)")
        return
    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)

    def loss(hidden_TH: Tensor, head_VH: Tensor) -> tuple[Tensor]:
        return (liger(hidden_TH, head_VH, inputs.teacher_TH, inputs.teacher_VH, inputs.labels_T),)

    _measure(report, inputs, "Liger-Kernel, jsd", loss)
