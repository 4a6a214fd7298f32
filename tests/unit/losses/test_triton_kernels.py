"""The Triton kernels under Triton's interpreter, and their translation to machine code; no GPU is needed.

Both happen in processes of their own: Triton decides when it is imported whether it interprets, and a crash of its
compiler shall not end the other tests. Not covered here: that the machine code computes the same (tests/gpu/test_triton_kernels.py).
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from megatron_gkd.losses import distill_loss
from tests.support.loss_cases import CASE_NAMES, DIVERGENCE_CASES, case_names

NAMES = ("forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
FORMULAS = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
KERNELS = [
    ("normalizers", {}),
    ("kl_sums", {"FORWARD": 1, "REVERSE": 1}),
    ("kl_gradient", {"FORWARD": 1, "REVERSE": 1}),
    *[(kernel, {"FORMULA": f}) for kernel in ("entry_sums", "entry_gradient") for f in FORMULAS],
]


def other_process(variables):
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=set_variables,
        initargs=(variables,),
    )


def set_variables(variables):
    os.environ.update(variables)


@pytest.fixture(scope="module")
def interpreted():
    """``interpreted(name, ...)`` runs a check of ``tests.support.triton_checks`` under the interpreter."""
    with other_process({"TRITON_INTERPRET": "1"}) as process:
        yield lambda name, *args, **how: process.submit(run_check, name, *args, **how).result()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    with other_process({"TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}) as process:
        yield lambda *args: process.submit(compile_kernel, *args).result()


def run_check(name, *args, **how):
    from tests.support import triton_checks

    with triton_checks.small_tiles():
        getattr(triton_checks, name)("cpu", *args, **how)


def compile_kernel(name, logits, constants):
    from megatron_gkd.losses.kernels import triton_kernels
    from tests.support.compiling import compile_for_gpu

    return len(compile_for_gpu(getattr(triton_kernels, name), logits, 90, constants))


@pytest.mark.parametrize(("name", "how"), DIVERGENCE_CASES, ids=CASE_NAMES)
def test_value_and_gradient_are_those_of_float64(interpreted, name, how):
    interpreted("check_value_and_gradient", name, how, dtype=torch.float32, scale=3.0, bound=1e-6, tokens=5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_a_wide_range(interpreted, name):
    interpreted("check_value_and_gradient", name, {}, dtype=torch.float32, scale=30.0, bound=2e-6, tokens=16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_read_exactly(interpreted, name, dtype):
    interpreted("check_value_and_gradient", name, {}, dtype=dtype, scale=3.0, bound=1e-6, tokens=5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_exactly_zero_loss_and_gradient(interpreted, name, dtype):
    interpreted("check_equal_models", name, dtype)


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_the_loss_of_similar_models_keeps_its_digits(interpreted, name):
    interpreted("check_similar_models", name, 2**-16, 1e-2)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "mixed_kl"])
@pytest.mark.parametrize(("distance", "bound"), [(1e-3, 1e-4), (1e-4, 1e-2)])
def test_the_kl_of_similar_models_keeps_its_digits(interpreted, name, distance, bound):
    interpreted("check_similar_models", name, distance, bound)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("std", "bound"), [(8.0, 2e-6), (16.0, 2e-5)])
def test_gradients_of_independent_peaked_models(interpreted, name, std, bound):
    interpreted("check_peaked_models", name, std, bound)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_certificate_on_tiles_refuses_a_broken_rescaling(interpreted, name):
    interpreted("check_a_broken_rescaling_is_refused", name)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_wider_buffer(interpreted, name):
    interpreted("check_padded_rows", name)


@pytest.mark.parametrize("name", NAMES)
def test_special_values_stay_in_their_rows(interpreted, name):
    interpreted("check_special_values", name)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_a_shard(interpreted, name):
    interpreted("check_sums_of_a_shard", name)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_takes_the_place_of_the_logits(interpreted, name):
    interpreted("check_gradient_in_place", name)


def test_no_columns_and_no_rows(interpreted):
    interpreted("check_nothing_to_do")


def test_plain_operations_do_what_the_kernels_do_not(interpreted):
    interpreted("check_plain_operations_do_the_rest")


@pytest.mark.parametrize(("kernel", "constants"), KERNELS, ids=case_names(KERNELS))
def test_kernels_become_machine_code(compiled, kernel, constants):
    assert compiled(kernel, "*bf16" if "REVERSE" in constants else "*fp32", {**constants, "TILE": 4096}) > 0


def test_logits_on_a_cpu_are_refused_with_the_fix():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"set loss\.backend=auto"):
        distill_loss(logits, logits, divergence="forward_kl", backend="triton")


def test_triton_is_imported_only_where_it_runs():
    code = """
import sys, torch
from megatron_gkd.losses import distill_loss
distill_loss(torch.zeros(2, 3), torch.zeros(2, 3), divergence="jsd", backend="auto")
assert "triton" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
