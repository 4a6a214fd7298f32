"""Products with factors of half precision on CUDA; on the CPU: tests/unit/platform/test_products.py."""

import pytest
import torch

from megatron_gkd.platform.products import as_factor, matmul_into

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", [False, True])
def test_the_sum_of_a_half_precision_product_is_not_rounded(dtype, add):
    rng = torch.Generator("cuda").manual_seed(0)
    left, right, out = (
        torch.randn(shape, generator=rng, device="cuda") for shape in ((64, 96), (160, 96), (64, 160))
    )
    left, right = as_factor(left, right.to(dtype)), right.to(dtype).t()
    want = left.double() @ right.double() + out.double() * add
    matmul_into(out, left, right, add=add)
    assert left.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
