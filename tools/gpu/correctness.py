"""Stages that compare the loss and its products on the device with float64.

Shapes: T = tokens, V = vocabulary, H = hidden size, M, K, N = sizes of a matrix product.
"""

import json
import math
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megatron_gkd.losses import DIVERGENCES, linear_distill_loss
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from megatron_gkd.platform.products import matmul_into
from tools.gpu.machine import Machine
from tools.gpu.report import StageReport

ROOT = Path(__file__).parents[2]

# K = 0 is a rank without columns; 61, 7 and 4097 give leading dimensions that no GEMM likes
_PRODUCT_SHAPES = ((64, 96, 160), (61, 32, 61), (7, 5, 3), (256, 0, 64), (128, 64, 4097))
_NUM_TOKENS, _HIDDEN_SIZE, _TOKENS_PER_CHUNK = 48, 64, 20
_VALUE_BOUND = 2e-6
_GRADIENT_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def products(machine: Machine, report: StageReport) -> None:
    """Half-precision products into float32: strides, K = 0, accumulation, garbage in the output."""
    for dtype, (m, k, n) in product((torch.bfloat16, torch.float16), _PRODUCT_SHAPES):
        worst = 0.0
        for add, is_transposed in product((False, True), (False, True)):
            left = machine.randn(k, m, dtype=dtype).t() if is_transposed else machine.randn(m, k, dtype=dtype)
            right = machine.randn(n, k, dtype=dtype).t()
            # beta = 0 must not read the output: NaN there would survive a multiplication by 0
            out = machine.randn(m, n) if add else torch.full((m, n), math.nan, device=machine.device)
            want = left.double() @ right.double() + (out.double() if add else 0)
            matmul_into(out, left, right, add=add)
            error = (out.double() - want).abs().max() / want.abs().max().clamp(min=1e-9)
            worst = max(worst, error.nan_to_num(nan=math.inf).item())
        report.at_most(f"{_name(dtype)} [{m}, {k}] x [{k}, {n}]", worst, 1e-5, "of the largest entry")


def dense(machine: Machine, report: StageReport) -> None:
    """Value and gradients at a real vocabulary: many tiles of a row, a part-filled last one, padding."""
    for valid, dtype in product((machine.vocab_size, machine.odd_vocab_size), _GRADIENT_BOUNDS):
        inputs = _exact_inputs(machine, dtype)
        for divergence in DIVERGENCES:
            label = f"{divergence} {_name(dtype)}, {valid} of {machine.vocab_size} entries"
            value, hidden, head = _errors(inputs, divergence, valid)
            report.at_most(f"{label}: value", value, _VALUE_BOUND, "relative L2")
            report.at_most(f"{label}: hidden gradient", hidden, _GRADIENT_BOUNDS[dtype], "relative L2")
            report.at_most(f"{label}: head gradient", head, _GRADIENT_BOUNDS[dtype], "relative L2")


def _exact_inputs(machine: Machine, dtype: torch.dtype) -> list[Tensor]:
    """(student hidden, student head, teacher hidden, teacher head), in multiples of 1/16.

    Their logits are sums of few bits, which any accumulation forms exactly: the errors are the loss's own.
    """
    shapes = ((_NUM_TOKENS, 16.0), (machine.vocab_size, 6.0)) * 2
    return [machine.randn(rows, _HIDDEN_SIZE).mul(scale).round().div(16).to(dtype) for rows, scale in shapes]


def _errors(inputs: list[Tensor], divergence: str, valid: int) -> tuple[float, float, float]:
    """Relative errors of (value, gradient of the hidden states, gradient of the head)."""
    hidden_TH, head_VH = (x.clone().requires_grad_() for x in inputs[:2])
    total, loss_T = linear_distill_loss(
        hidden_TH,
        head_VH,
        *inputs[2:],
        divergence=divergence,
        valid_vocab_size=valid,
        token_weight_T=torch.ones(_NUM_TOKENS, device=hidden_TH.device),
        tokens_per_chunk=_TOKENS_PER_CHUNK,
    )
    total.backward()
    want_TH, want_VH = (x.double().requires_grad_() for x in inputs[:2])
    teacher_TH, teacher_VH = (x.double() for x in inputs[2:])
    want_T = dense_divergence(want_TH @ want_VH[:valid].T, teacher_TH @ teacher_VH[:valid].T, divergence)
    want_T.sum().backward()
    pairs = (
        (loss_T, want_T.detach()),
        (hidden_TH.grad, want_TH.grad),
        (head_VH.grad, want_VH.grad),
    )
    value, hidden, head = (
        relative_error(got, want) for got, want in pairs if got is not None and want is not None
    )
    return value, hidden, head


def certify(machine: Machine, report: StageReport) -> None:
    """Every divergence on every support, from hidden states: ``tools/verify_loss.py`` on this device."""
    formats = ["fp32"] if machine.is_smoke else ["fp32", "bf16"]
    command = [sys.executable, "tools/verify_loss.py", "--tokens-per-chunk", "16", "--dtype", *formats]
    if machine.is_smoke:
        command += ["--divergence", "jsd"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "certificates.json")
        result = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
        if not file.is_file():
            raise RuntimeError(f"{' '.join(command)} wrote no result:\n{result.stderr[-3000:]}")
        content = json.loads(file.read_text())
    report.measured("losses", len(content["rows"]))
    for gate in content["gates"]:
        report.at_most(gate["name"], gate["value"], gate["bound"], "relative L2")
    for row in content["rows"]:
        if not row["passed"]:
            report.holds(f"{row['loss']} {row['dtype']}", False, json.dumps(row))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
