"""The compiled back end: values and gradients against float64, special values against the eager back end.

A split vocabulary is played in one process: the ranks' rounds run in step. Compiling takes seconds once; what was compiled
is kept in a folder, and in the process for all tests here.

Not covered here: collectives (tests/distributed/test_overwritten_logits.py).
"""

import math
import shutil

import pytest
import torch

from megatron_gkd.losses import DIVERGENCES, distill_loss
from megatron_gkd.losses.dense import make_dense_loss
from megatron_gkd.losses.divergences import make_divergence
from megatron_gkd.losses.kernels import compiled, make_kernels
from megatron_gkd.losses.kernels.eager import EagerKernels
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from megatron_gkd.losses.vocab_parallel import Temperatures
from tests.support.loss_cases import make_logits, make_upstream
from tests.unit.losses.test_rounds import FakeGroup, in_step

pytestmark = pytest.mark.timeout(300)

NAMES = [name for name in DIVERGENCES if name != "adaptive_kl"]


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    """Passes over a few rows, so that every loop over them runs several times."""
    assert shutil.which("g++"), "install a C++ compiler: nothing would be tested here"
    monkeypatch.setattr(compiled, "_ELEMENTS_PER_PASS", 4000)


def dense(student, teacher, name, weight, **how):
    student = student.detach().double().clone().requires_grad_()
    value = dense_divergence(student, teacher.double(), name, **how)
    (value * weight).sum().backward()
    return value.detach(), student.grad


def overwritten(student, teacher, name, weight, backend, **how):
    """(loss, gradient) with both logits given up; neither argument is changed."""
    student = student.detach().clone().requires_grad_()
    options = {"token_weight_T": weight, "overwrite_logits": True, "backend": backend, **how}
    total, loss = distill_loss(student * 1, teacher.clone(), divergence=name, **options)
    total.backward()
    return loss, student.grad


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_float64(name):
    student, teacher = make_logits()
    weight = make_upstream(24)
    want, want_grad = dense(student, teacher, name, weight)
    loss, grad = overwritten(student.float(), teacher.float(), name, weight, "compiled")
    assert relative_error(loss, want) <= 1e-6
    assert relative_error(grad, want_grad) <= 1e-6


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_kept_give_the_same(name, dtype):
    how = {"temperature": 2.0, "teacher_temperature": 1.5}
    student, teacher = (z.to(dtype) for z in make_logits())
    kept, weight = (student.clone(), teacher.clone()), make_upstream(24)
    want, want_grad = dense(student, teacher, name, weight, **how)
    rounding = relative_error(want_grad.to(dtype), want_grad)
    for loss, grad in (
        overwritten(student, teacher, name, weight, "compiled", **how),
        per_token(student, teacher, name, weight, **how),
    ):
        assert relative_error(loss, want) <= 1e-6
        assert grad.dtype == dtype
        assert relative_error(grad, want_grad) <= 1.01 * rounding + 1e-6
    assert student.equal(kept[0])
    assert teacher.equal(kept[1])


def per_token(student, teacher, name, weight, **how):
    student = student.detach().requires_grad_()
    loss = distill_loss(student, teacher, divergence=name, backend="compiled", **how)
    (loss * weight).sum().backward()
    return loss, student.grad


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_have_exactly_zero_loss_and_gradient(name):
    student = make_logits(scale=10.0)[0].float()
    loss, grad = overwritten(student, student, name, make_upstream(24), "compiled")
    assert loss.eq(0).all()
    assert grad.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_special_values_are_those_of_the_eager_back_end(name):
    student, teacher = (z.float() for z in make_logits(tokens=14, vocab=512))
    teacher[1, 3] = -math.inf
    student[2, 5] = teacher[2, 5] = -math.inf
    student[3, 7] = -math.inf
    student[4, 2] = math.nan
    teacher[5, 2] = math.nan
    student[6, 1] = math.inf
    teacher[7, 1] = math.inf
    student[8] = -math.inf
    teacher[9] = -math.inf
    student[10], teacher[10] = -1e4, 1e4
    student[11, 0], teacher[11, 1] = -1e4, 1e4
    weight = torch.ones(14)
    want, want_grad = overwritten(student, teacher, name, weight, "eager")
    loss, grad = overwritten(student, teacher, name, weight, "compiled")
    close = {"rtol": 2e-5, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(loss, want, **close)
    assert want[[0, 2, 10, 11, 12, 13]].isfinite().all()
    assert grad[10:12].isfinite().all()  # rounded at 1e4
    rows = [row for row in (0, 1, 2, 3, 12, 13) if want[row].isfinite()]
    torch.testing.assert_close(grad[rows], want_grad[rows], **close)
    assert loss[4:10].isnan().all()
    assert not grad[4:10].isfinite().all(-1).any()


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_split_vocabulary_gives_the_value_and_gradient_of_float64(name):
    student, teacher = make_logits()
    weight = make_upstream(24)
    want, want_grad = dense(student, teacher, name, weight)
    shards = [(z[:, :200].float(), z[:, 200:].float()) for z in (student, teacher)]
    pairs = list(zip(*shards, strict=True))
    divergence = make_divergence(name, beta=0.5)
    losses = [
        make_dense_loss(divergence, Temperatures(1.0, 1.0), FakeGroup(rank, 2), "compiled")
        for rank in range(2)
    ]
    results = in_step([loss.rounds(x, y) for loss, (x, y) in zip(losses, pairs, strict=True)])
    for loss, (x, y), (_, stats) in zip(losses, pairs, results, strict=True):
        loss.write_gradient(x, y, stats, weight.float(), x)
    assert results[0][0].equal(results[1][0])
    assert relative_error(results[0][0], want) <= 1e-6
    assert relative_error(torch.cat([x for x, _ in pairs], -1), want_grad) <= 1e-6


@pytest.mark.parametrize("rows", [0, 1, 2, 23])
def test_other_numbers_of_rows_and_columns_are_not_compiled_again(rows):
    overwritten(*(z.float() for z in make_logits()), "jsd", make_upstream(24), "compiled")
    student, teacher = make_logits(tokens=max(rows, 1), vocab=300 + rows)
    student, teacher = student[:rows], teacher[:rows]
    weight = torch.ones(rows, dtype=torch.float64)
    with torch.compiler.set_stance("fail_on_recompile"):
        loss, grad = overwritten(student.float(), teacher.float(), "jsd", weight, "compiled")
    want, want_grad = dense(student, teacher, "jsd", weight)
    assert loss.shape == (rows,)
    if rows:
        assert relative_error(loss, want) <= 1e-6
        assert relative_error(grad, want_grad) <= 1e-6


def test_float64_stays_float64():
    student, teacher = make_logits()
    weight = make_upstream(24)
    want, want_grad = dense(student, teacher, "jsd", weight)
    loss, grad = overwritten(student, teacher, "jsd", weight, "compiled")
    assert relative_error(loss, want) <= 1e-12
    assert relative_error(grad, want_grad) <= 1e-12


def test_without_a_compiler_the_eager_back_end_is_taken_and_the_reason_logged(monkeypatch, caplog):
    from megatron_gkd.platform import compiler

    def fail(*_, **__):
        raise RuntimeError("no working C++ compiler found")

    compiler.can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", fail)
    for _ in range(2):
        kernels = make_kernels("compiled", make_divergence("tvd"), Temperatures(1.0, 1.0))
        assert isinstance(kernels, EagerKernels)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no working C++ compiler found" in caplog.text
    compiler.can_compile.cache_clear()
