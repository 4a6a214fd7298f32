"""``distill_loss(..., overwrite_logits=True)`` in one process.

Not covered here: the compiled back end (test_compiled_kernels.py), split vocabularies (tests/distributed).
"""

import math

import pytest
import torch

from megatron_gkd.losses import DIVERGENCES, distill_loss
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from tests.support.counting import counted
from tests.support.loss_cases import CASE_NAMES, DIVERGENCE_CASES, make_logits, make_upstream

pytestmark = pytest.mark.usefixtures("small_pieces")


def dense(student, teacher, name, how, weight):
    student = student.clone().requires_grad_()
    value = dense_divergence(student, teacher, name, **how)
    (value * weight).sum().backward()
    return value.detach(), student.grad


@pytest.mark.parametrize(("name", "how"), DIVERGENCE_CASES, ids=CASE_NAMES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_value_and_gradient_are_those_of_float64(name, how, dtype, bound):
    student, teacher = (z.to(dtype).double() for z in make_logits())
    weight = make_upstream(len(student))
    want, want_grad = dense(student, teacher, name, how, 3 * weight)
    mine = student.to(dtype, copy=True).requires_grad_()
    options = {"token_weight_T": weight, "overwrite_logits": True, **how}
    total, loss = distill_loss(mine * 1, teacher.to(dtype, copy=True), divergence=name, **options)
    (3 * total).backward()
    assert not loss.requires_grad
    assert relative_error(loss, want) <= bound
    torch.testing.assert_close(total.double(), (want * weight).sum(), rtol=1e-6, atol=0)
    rounding = relative_error(want_grad.to(dtype), want_grad)
    assert relative_error(mine.grad, want_grad) <= 3 * rounding + bound  # rounded, and again times 3


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_vocabulary_is_allocated(name, dtype):
    student, teacher = (z.to(dtype) for z in make_logits(tokens=40, vocab=500))
    student.requires_grad_()
    logits = student * 1
    options = {"token_weight_T": torch.ones(40), "overwrite_logits": True}
    with counted() as counts:
        total, _ = distill_loss(logits, teacher, divergence=name, **options)
        (gradient,) = torch.autograd.grad(total, logits)
    bins = 40 * 66 if name == "adaptive_kl" else 0  # a histogram, whatever the vocabulary
    assert counts.largest_allocation <= max(3 * 500, bins)
    assert gradient.data_ptr() == logits.data_ptr()


def test_padding_gets_gradient_zero():
    student, teacher = make_logits(tokens=4, vocab=12)
    want, want_grad = dense(student, teacher, "jsd", {}, torch.ones(4))
    mine = torch.cat([student, torch.full((4, 4), 70.0)], -1).requires_grad_()
    garbage = torch.cat([teacher, torch.full((4, 4), math.nan)], -1)
    options = {"valid_vocab_size": 12, "token_weight_T": torch.ones(4), "overwrite_logits": True}
    total, loss = distill_loss(mine * 1, garbage, divergence="jsd", **options)
    total.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(mine.grad[:, :12], want_grad)
    assert mine.grad[:, 12:].eq(0).all()


def test_logits_are_left_alone_where_no_gradient_is_asked_for():
    student, teacher = make_logits()
    kept = student.clone(), teacher.clone()
    options = {"token_weight_T": torch.ones(24), "overwrite_logits": True}
    total, loss = distill_loss(student, teacher, divergence="jsd", **options)
    assert student.equal(kept[0])
    assert teacher.equal(kept[1])
    torch.testing.assert_close(total, loss.sum())


def test_autograd_refuses_a_graph_that_still_needs_the_logits():
    student, teacher = make_logits()
    logits = student.requires_grad_() * 1
    regularizer = logits.square().sum()
    options = {"token_weight_T": torch.ones(24), "overwrite_logits": True}
    total, _ = distill_loss(logits, teacher, divergence="jsd", **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total + regularizer).backward()


def test_no_rows_give_an_empty_loss_and_gradient():
    student = torch.zeros(0, 12, requires_grad=True)
    options = {"token_weight_T": torch.ones(0), "overwrite_logits": True}
    total, loss = distill_loss(student * 1, torch.zeros(0, 12), divergence="jsd", **options)
    total.backward()
    assert total == 0
    assert loss.shape == (0,)
    assert student.grad.shape == (0, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overwrite_logits": True}, "pass both or neither"),
        ({"token_weight_T": torch.ones(4)}, "pass both or neither"),
        ({"token_weight_T": torch.ones(5), "overwrite_logits": True}, r"token_weight_T \(5,\) does not fit"),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(torch.zeros(4, 12), torch.zeros(4, 12), divergence="jsd", **options)
