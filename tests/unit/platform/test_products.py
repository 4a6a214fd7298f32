"""Products with factors of half precision on the CPU. Not covered here: CUDA (tests/gpu/test_products.py)."""

import pytest
import torch

from megatron_gkd.platform import products
from megatron_gkd.platform.products import as_factor, matmul_into, rounds_factors
from tests.support.counting import counted

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 8)


def random(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(3, 5, 21), (3, 21, 5), (1, 8, 8), (4, 17, 19)])
@pytest.mark.parametrize("add", [False, True])
def test_a_product_of_half_precision_is_summed_in_float32(dtype, shape, add):
    rows, inner, columns = shape
    left, right = random(rows, inner, dtype=dtype), random(columns, inner, dtype=dtype).t()
    before = random(rows, columns, dtype=torch.float32)
    out = before.clone()
    matmul_into(out, left, right, add=add)
    want = left.double() @ right.double() + before.double() * add
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_a_result_in_half_precision_is_rounded_once(dtype):
    left, right = random(4, 37, dtype=torch.float32), random(37, 9, dtype=dtype)
    out = torch.empty(4, 9, dtype=dtype)
    matmul_into(out, left, right)
    wide = torch.empty(4, 9)
    matmul_into(wide, left, right)
    assert torch.equal(out, wide.to(dtype))


def test_what_was_in_the_result_does_not_matter():
    out = torch.full((2, 20), float("nan"))
    matmul_into(out, random(2, 20, dtype=torch.float32), random(20, 20, dtype=torch.bfloat16))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_product_of_nothing_is_zero(dtype):
    left, right = torch.empty(3, 0), torch.empty(0, 5, dtype=torch.bfloat16)
    out = torch.full((3, 5), float("nan"), dtype=dtype)
    matmul_into(out, left, right)
    assert out.eq(0).all()
    out.fill_(2.0)
    matmul_into(out, left, right, add=True)
    assert out.eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_in_one_format_allocates_nothing(dtype):
    left, right, out = random(4, 6, dtype=dtype), random(6, 20, dtype=dtype), torch.empty(4, 20, dtype=dtype)
    with counted() as counts:
        matmul_into(out, left, right)
    assert (counts.products, counts.total_allocated) == (1, 0)
    torch.testing.assert_close(out, left @ right)


def test_a_cpu_keeps_a_factor_in_float32():
    x, partner = random(2, 2, dtype=torch.float32), random(2, 2, dtype=torch.bfloat16)
    assert as_factor(x, partner) is x
    assert not rounds_factors(x.device)
    assert rounds_factors(torch.device("cuda", 0))
