"""The Triton kernels as machine code, at the size of a real vocabulary; tests/unit/losses has them interpreted."""

import pytest
import torch

from tests.support import triton_checks as checks
from tests.support.loss_cases import CASE_NAMES, DIVERGENCE_CASES

pytestmark = pytest.mark.gpu

VOCAB = 151_936
NAMES = ("forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
ROWS_BEYOND_INT32 = 2**31 // VOCAB + 8


@pytest.mark.parametrize(("name", "how"), DIVERGENCE_CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_float64(name, how, dtype):
    checks.check_value_and_gradient(
        "cuda", name, how, dtype=dtype, scale=3.0, bound=1e-6, tokens=24, vocab=VOCAB
    )


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_have_exactly_zero_loss_and_gradient(name):
    for dtype in (torch.float32, torch.bfloat16):
        checks.check_equal_models("cuda", name, dtype, vocab=VOCAB)


@pytest.mark.parametrize("check", ["padded_rows", "special_values", "sums_of_a_shard", "gradient_in_place"])
@pytest.mark.parametrize("name", NAMES)
def test_small_rows_do_what_they_do_under_the_interpreter(name, check):
    with checks.small_tiles():
        getattr(checks, f"check_{check}")("cuda", name)


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_the_loss_of_similar_models_keeps_its_digits(name):
    checks.check_similar_models("cuda", name, 2**-16, 1e-2)


def test_no_columns_and_no_rows():
    checks.check_nothing_to_do("cuda")


def test_plain_operations_do_what_the_kernels_do_not():
    checks.check_plain_operations_do_the_rest("cuda")


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_the_last_rows_of_more_than_2_31_logits(name):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    student = torch.zeros(ROWS_BEYOND_INT32, VOCAB, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros_like(student)
    upstream = torch.ones(len(student), device="cuda")
    student[-1] = torch.linspace(-3, 3, VOCAB, device="cuda")
    want_loss, want_grad = checks.value_and_gradient(
        student[-1:].double(), teacher[-1:].double(), upstream[-1:], divergence=name, backend="eager"
    )
    loss, grad = checks.value_and_gradient(student, teacher, upstream, divergence=name, backend="triton")
    assert loss[:-1].eq(0).all()
    torch.testing.assert_close(loss[-1:].double(), want_loss, rtol=1e-5, atol=0)
    assert checks.relative_error(grad[-1:], want_grad) < 4e-3
    assert not grad[-2].any()
