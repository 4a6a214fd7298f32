"""What the Triton kernels have to do, on whatever runs them: the interpreter on a CPU, or a GPU.

Shapes: T = tokens, V = the whole vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_gkd.losses import distill_loss, linear_distill_loss
from megatron_gkd.losses.divergences import Separable, WeightedKL, make_divergence
from megatron_gkd.losses.kernels import find_kernels, triton_launch
from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.reference import dense_divergence, dense_linear, relative_error
from megatron_gkd.losses.softmax import Temperatures
from tests.support.loss_cases import make_linear_inputs, make_logits, make_upstream

TRITON = find_kernels("triton")


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 64 columns, so that a row of a test has several, and the last one is not full."""
    with patch.object(triton_launch, "_TILE", 64):
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


def check_similar_models(device: str, name: str) -> None:
    """A divergence of 1e-10 nats keeps digits: the rounding of the logarithms, larger than that, cancels."""
    teacher_TV = make_logits(tokens=3, vocab=150)[0].float().double()
    noise_TV = make_logits(tokens=3, vocab=150, seed=1)[0] * 2**-16
    student_TV = (teacher_TV + noise_TV).float().double()
    want_T = dense_divergence(student_TV, teacher_TV, name)
    loss_T = distill_loss(
        student_TV.to(device, torch.float32),
        teacher_TV.to(device, torch.float32),
        divergence=name,
        backend="triton",
    )
    assert isinstance(loss_T, Tensor)
    assert want_T.max() < 1e-9
    assert relative_error(loss_T.cpu(), want_T) <= 1e-2


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


def check_sums_of_a_shard(device: str, name: str) -> None:
    """The statistics of a part of the vocabulary are those of plain operations in float64."""
    exact_x_TV, exact_y_TV = (z[:, 20:120] for z in make_logits(tokens=3, vocab=150))
    x_TV, y_TV = (z.to(device, torch.float32) for z in (exact_x_TV, exact_y_TV))
    temperatures = Temperatures(0.8, 1.5)
    norms_T4 = EAGER.normalizers(*make_logits(tokens=3, vocab=150), temperatures)
    divergence = make_divergence(name, 0.3, 0.2, 0.4)
    if isinstance(divergence, WeightedKL):
        got = TRITON.kl_sums(x_TV, y_TV, divergence, temperatures)
        want = EAGER.kl_sums(exact_x_TV, exact_y_TV, divergence, temperatures)
    else:
        assert isinstance(divergence, Separable)
        got = torch.cat(
            [
                TRITON.normalizers(x_TV, y_TV, temperatures),
                TRITON.term_sums(x_TV, y_TV, norms_T4.to(x_TV), divergence, temperatures),
            ],
            -1,
        )
        want = torch.cat(
            [
                EAGER.normalizers(exact_x_TV, exact_y_TV, temperatures),
                EAGER.term_sums(exact_x_TV, exact_y_TV, norms_T4, divergence, temperatures),
            ],
            -1,
        )
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=1e-6)


def check_nothing_to_do(device: str) -> None:
    """A shard without columns counts as excluded entries; no rows are no rows."""
    kl, tvd = WeightedKL(1.0, 1.0), make_divergence("tvd", 0, 0, 0)
    assert isinstance(tvd, Separable)
    lowest = torch.finfo(torch.float32).min
    temperatures = Temperatures(1.0, 1.0)
    empty_TV = torch.zeros(2, 0, device=device)
    sums_TK = TRITON.kl_sums(empty_TV, empty_TV, kl, temperatures)
    assert sums_TK.tolist() == [[lowest, 0, lowest, 0, 0, 0]] * 2
    assert TRITON.term_sums(empty_TV, empty_TV, sums_TK[:, :4], tvd, temperatures).tolist() == [[0, 0]] * 2
    no_rows_TV, numbers = torch.zeros(0, 5, device=device), torch.zeros(0, 5, device=device)
    for logits_TV, stats in ((empty_TV, sums_TK[:, :5]), (no_rows_TV, numbers)):
        upstream_T = stats[:, 0]
        TRITON.write_kl_gradient(logits_TV, logits_TV, stats, upstream_T, kl, temperatures, logits_TV)
        TRITON.write_gradient_(logits_TV, logits_TV, stats, upstream_T, tvd, temperatures)
    assert TRITON.normalizers(no_rows_TV, no_rows_TV, temperatures).shape == (0, 4)


def check_gradient_in_place(device: str, name: str) -> None:
    """Hidden states: each chunk's logits are overwritten with their gradient."""
    exact = make_linear_inputs(tokens=5, vocab=150, hidden=8, teacher_hidden=8)
    weight_T = make_upstream(5)
    student_TH, head_VH = (z.clone().requires_grad_() for z in exact[:2])
    (dense_linear(student_TH, head_VH, *exact[2:], name) * weight_T).sum().backward()
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
    """A divergence without a formula, float64, and columns that are not adjacent give the bits of ``EAGER``."""
    student_TV, teacher_TV = (z.to(device) for z in make_logits(tokens=3, vocab=150))
    norms_T4 = EAGER.normalizers(student_TV, teacher_TV, Temperatures(1.0, 1.0))
    squares = Separable(lambda log_p, log_q: ((log_q - log_p) ** 2, 2 * (log_q - log_p)))
    tvd = make_divergence("tvd", 0, 0, 0)
    assert isinstance(tvd, Separable)
    transposed = [z.float().t().contiguous().t() for z in (student_TV, teacher_TV)]
    for pair, divergence in (
        ([student_TV.float(), teacher_TV.float()], squares),
        ([student_TV, teacher_TV], tvd),
        (transposed, tvd),
    ):
        x_TV, y_TV = pair
        arguments = x_TV, y_TV, norms_T4.to(x_TV.dtype), divergence, Temperatures(1.0, 1.0)
        assert torch.equal(TRITON.term_sums(*arguments), EAGER.term_sums(*arguments))
