"""What the Triton kernels have to do, on whatever runs them: the interpreter on a CPU, or a GPU.

Shapes: T = tokens, V = the whole vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton
import triton.language as tl  # noqa: F401  (a jit function looks for it here)
from torch import Tensor

from megatron_gkd.config.loss import LossSettings
from megatron_gkd.losses import distill_loss, linear_distill_loss
from megatron_gkd.losses.divergences import TVD, Separable, WeightedKL, make_divergence
from megatron_gkd.losses.kernels import DenseKernels, make_kernels
from megatron_gkd.losses.kernels import triton as back_end
from megatron_gkd.losses.verify.certificate import certify
from megatron_gkd.losses.verify.problem import Case
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from megatron_gkd.losses.vocab_parallel import Temperatures
from tests.support.loss_cases import (
    make_independent_logits,
    make_linear_inputs,
    make_logits,
    make_similar_logits,
    make_upstream,
)

UNIT_TAUS = Temperatures(1.0, 1.0)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 64 columns, so that a row of a test has several, and the last one is not full."""
    with patch.object(back_end, "TILE", 64):
        yield


def value_and_gradient(
    student_TV: Tensor, teacher_TV: Tensor, upstream_T: Tensor, **how
) -> tuple[Tensor, Tensor]:
    """(loss_T, gradient [T, V]) of ``distill_loss``."""
    mine_TV = student_TV.detach().requires_grad_()
    loss_T = distill_loss(mine_TV, teacher_TV, **how)
    assert isinstance(loss_T, Tensor)
    (loss_T * upstream_T.to(loss_T)).sum().backward()
    assert mine_TV.grad is not None
    return loss_T.detach(), mine_TV.grad


def check_value_and_gradient(
    device: str,
    name: str,
    how: dict,
    *,
    dtype: torch.dtype,
    scale: float,
    bound: float,
    tokens: int,
    vocab: int = 150,
) -> None:
    """Both are those of float64."""
    student_TV, teacher_TV = (
        z.to(dtype).double() for z in make_logits(tokens=tokens, vocab=vocab, scale=scale)
    )
    upstream_T = make_upstream(tokens)
    want_TV = student_TV.clone().requires_grad_()
    want_T = dense_divergence(want_TV, teacher_TV, name, **how)
    (want_T * upstream_T).sum().backward()
    assert want_TV.grad is not None
    loss_T, grad_TV = value_and_gradient(
        student_TV.to(device, dtype),
        teacher_TV.to(device, dtype),
        upstream_T.to(device),
        divergence=name,
        backend="triton",
        **how,
    )
    assert loss_T.dtype == torch.float32
    assert grad_TV.dtype == dtype
    assert relative_error(loss_T.cpu(), want_T.detach()) <= 1e-6
    # the interpreter cuts bfloat16 off where a GPU rounds: an error of 2**-8 at most, about 4e-3 in the mean
    rounding = {torch.float32: 0.0, torch.bfloat16: 5e-3, torch.float16: 5e-4}[dtype]
    assert relative_error(grad_TV.cpu(), want_TV.grad) <= rounding + bound


def check_equal_models(device: str, name: str, dtype: torch.dtype, *, vocab: int = 150) -> None:
    """Loss and gradient are exactly 0."""
    student_TV = make_logits(tokens=3, vocab=vocab, scale=10.0)[0].to(device, dtype)
    loss_T, grad_TV = value_and_gradient(
        student_TV,
        student_TV.clone(),
        torch.ones(3, device=device),
        divergence=name,
        temperature=1.3,
        backend="triton",
    )
    assert loss_T.eq(0).all()
    assert grad_TV.eq(0).all()


def check_similar_models(device: str, name: str, distance: float, bound: float) -> None:
    """The smallest divergences keep digits: the rounding of the logarithms, larger than them, cancels."""
    student_TV, teacher_TV = make_similar_logits(tokens=3, vocab=150, distance=distance)
    want_T = dense_divergence(student_TV, teacher_TV, name)
    loss_T = distill_loss(
        student_TV.to(device, torch.float32),
        teacher_TV.to(device, torch.float32),
        divergence=name,
        backend="triton",
    )
    assert isinstance(loss_T, Tensor)
    assert loss_T.ge(0).all()
    assert relative_error(loss_T.cpu(), want_T) <= bound


def check_peaked_models(device: str, name: str, std: float, bound: float) -> None:
    """Gradients of independent models whose most probable entry has nearly all mass."""
    student_TV, teacher_TV = make_independent_logits(tokens=16, vocab=500, std=std)
    upstream_T = torch.ones(16)
    want_TV = student_TV.clone().requires_grad_()
    dense_divergence(want_TV, teacher_TV, name).sum().backward()
    assert want_TV.grad is not None
    x_TV, y_TV = (z.to(device, torch.float32) for z in (student_TV, teacher_TV))
    _, grad_TV = value_and_gradient(x_TV, y_TV, upstream_T.to(device), divergence=name, backend="triton")
    assert relative_error(grad_TV.cpu(), want_TV.grad) <= bound


def check_a_broken_rescaling_is_refused(device: str, name: str) -> None:
    """A certificate on tiles sees an online softmax that forgets to rescale; a row of one tile never rescales."""
    from megatron_gkd.losses.kernels import triton_kernels

    @triton.jit
    def forgotten(total, scale):
        return total

    small = Case(settings=LossSettings(divergence=name, backend="triton"), tokens_per_chunk=16)
    on_tiles = small.on_tiles()
    assert [case.num_columns % 16 for case in on_tiles] == [0, 61 % 16]

    def passed(case: Case) -> bool:
        return certify(case, group=None, device=torch.device(device)).is_passed

    assert all(passed(case) for case in on_tiles)
    with patch.object(triton_kernels, "_rescaled", forgotten):
        assert passed(small)
        assert not any(passed(case) for case in on_tiles)


def check_padded_rows(device: str, name: str) -> None:
    """Logits that are the leading columns of wider rows give the same bits, and padding gets gradient 0."""
    student_TV, teacher_TV = (z.to(device, torch.float32) for z in make_logits(tokens=3, vocab=150))
    upstream_T = torch.ones(3, device=device)
    want_T, want_TV = value_and_gradient(
        student_TV, teacher_TV, upstream_T, divergence=name, backend="triton"
    )
    garbage_TV = torch.full((3, 21), math.nan, device=device)
    x_TV, y_TV = (torch.cat([z, garbage_TV], -1) for z in (student_TV, teacher_TV))
    loss_T, grad_TV = value_and_gradient(
        x_TV, y_TV, upstream_T, divergence=name, valid_vocab_size=150, backend="triton"
    )
    assert torch.equal(loss_T, want_T)
    assert torch.equal(grad_TV[:, :150], want_TV)
    assert grad_TV[:, 150:].eq(0).all()


def check_special_values(device: str, name: str) -> None:
    """Excluded entries, NaN, +inf and a huge range do what they do in float64 with plain operations, row by row."""
    student_TV, teacher_TV = make_logits(tokens=9, vocab=150)
    teacher_TV[1, 3] = -math.inf
    student_TV[2, 70] = teacher_TV[2, 70] = -math.inf
    student_TV[3, 140], teacher_TV[4, 0] = math.nan, math.nan
    student_TV[5, 65], teacher_TV[6, 149] = math.inf, math.inf
    student_TV[7] *= 1e4
    teacher_TV[8, :64] = -math.inf  # a whole tile
    student_TV[8, :128] = student_TV[8, :128].where(teacher_TV[8, :128].isfinite(), -math.inf)
    upstream_T = torch.ones(9)
    want_T, want_TV = value_and_gradient(student_TV, teacher_TV, upstream_T, divergence=name, backend="eager")
    loss_T, grad_TV = value_and_gradient(
        student_TV.to(device, torch.float32),
        teacher_TV.to(device, torch.float32),
        upstream_T.to(device),
        divergence=name,
        backend="triton",
    )
    assert loss_T[3:7].isnan().all()
    assert grad_TV[3:7].isnan().all()
    torch.testing.assert_close(loss_T.cpu(), want_T.float(), equal_nan=True, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad_TV.cpu(), want_TV.float(), equal_nan=True, rtol=1e-4, atol=1e-6)


def both_kernels(divergence, temperatures: Temperatures) -> list[DenseKernels]:
    """Those of Triton and the plain ones."""
    return [make_kernels(name, divergence, temperatures) for name in ("triton", "eager")]


def check_sums_of_a_shard(device: str, name: str) -> None:
    """The statistics of a part of the vocabulary are those of plain operations in float64."""
    whole = make_logits(tokens=3, vocab=150)
    x_TV, y_TV = (z[:, 20:120] for z in whole)
    x32_TV, y32_TV = (z.to(device, torch.float32) for z in (x_TV, y_TV))
    divergence = make_divergence(name, beta=0.3, alpha=0.2, weight=0.4)
    kernels, plain = both_kernels(divergence, Temperatures(0.8, 1.5))
    got, want = kernels.first(x32_TV, y32_TV), plain.first(x_TV, y_TV)
    if not isinstance(divergence, WeightedKL):
        top_ratio_T1 = torch.tensor([[0.1], [0.9], [3.0]]).double()
        norms_T5 = torch.cat([plain.first(*whole)[:, :4], top_ratio_T1], -1)
        got = torch.cat([got, kernels.second(x32_TV, y32_TV, norms_T5.to(got))], -1)
        want = torch.cat([want, plain.second(x_TV, y_TV, norms_T5)], -1)
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=1e-6)


def check_nothing_to_do(device: str) -> None:
    """A shard without columns counts as excluded entries; no rows are no rows."""
    kl, tvd = (both_kernels(divergence, UNIT_TAUS)[0] for divergence in (WeightedKL(1.0, 1.0), TVD()))
    lowest = torch.finfo(torch.float32).min
    empty_TV = torch.zeros(2, 0, device=device)
    sums_TK = kl.first(empty_TV, empty_TV)
    assert sums_TK[:, :4].tolist() == [[lowest, 0, lowest, 0]] * 2
    assert sums_TK[:, 4:].isnan().all()  # of no distribution at all
    assert tvd.first(empty_TV, empty_TV).tolist() == [[lowest, 0, lowest, 0, -math.inf]] * 2
    assert tvd.second(empty_TV, empty_TV, sums_TK[:, :5]).tolist() == [[0, 0]] * 2
    no_rows_TV = torch.zeros(0, 5, device=device)
    for logits_TV, rows in ((empty_TV, 2), (no_rows_TV, 0)):
        upstream_T = torch.ones(rows, device=device)
        kl.gradient(logits_TV, logits_TV, torch.zeros(rows, 5, device=device), upstream_T, logits_TV)
        tvd.gradient(logits_TV, logits_TV, torch.zeros(rows, 6, device=device), upstream_T, logits_TV)
    assert tvd.first(no_rows_TV, no_rows_TV).shape == (0, 5)


def check_gradient_in_place(device: str, name: str) -> None:
    """Hidden states: each chunk's logits are overwritten with their gradient."""
    exact = make_linear_inputs(tokens=5, vocab=150, hidden=8, teacher_hidden=8)
    weight_T = make_upstream(5)
    student_TH, head_VH = (z.clone().requires_grad_() for z in exact[:2])
    student_TV, teacher_TV = student_TH @ head_VH.T, exact[2] @ exact[3].T
    (dense_divergence(student_TV, teacher_TV, name) * weight_T).sum().backward()
    inputs = [z.to(device, torch.float32) for z in exact]
    mine_TH, mine_VH = (z.requires_grad_() for z in inputs[:2])
    total, _ = linear_distill_loss(
        mine_TH,
        mine_VH,
        *inputs[2:],
        divergence=name,
        token_weight_T=weight_T.to(device, torch.float32),
        tokens_per_chunk=2,
        backend="triton",
    )
    total.backward()
    for got, want in ((mine_TH.grad, student_TH.grad), (mine_VH.grad, head_VH.grad)):
        assert got is not None
        assert want is not None
        assert relative_error(got.cpu(), want) <= 2e-6


def check_plain_operations_do_the_rest(device: str) -> None:
    """A divergence without a formula, float64, and columns that are not adjacent give the bits of the plain kernels."""
    student_TV, teacher_TV = (z.to(device) for z in make_logits(tokens=3, vocab=150))
    squares = Separable(lambda log_p, log_q: ((log_q - log_p) ** 2, 2 * (log_q - log_p)))
    transposed = [z.float().t().contiguous().t() for z in (student_TV, teacher_TV)]
    for pair, divergence in (
        ([student_TV.float(), teacher_TV.float()], squares),
        ([student_TV, teacher_TV], TVD()),
        (transposed, TVD()),
    ):
        kernels, plain = both_kernels(divergence, UNIT_TAUS)
        x_TV, y_TV = pair
        norms_T5 = plain.first(x_TV, y_TV)
        assert torch.equal(kernels.second(x_TV, y_TV, norms_T5), plain.second(x_TV, y_TV, norms_T5))
