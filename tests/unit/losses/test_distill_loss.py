"""``distill_loss`` in one process: value and gradient with respect to the logits.

Not covered here: split vocabularies and collectives (tests/distributed/test_split_vocabulary_loss.py).
"""

import gc
import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch

from megatron_gkd.losses import DIVERGENCES, distill_loss
from megatron_gkd.losses.divergences import Separable
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from tests.support.counting import counted
from tests.support.loss_cases import (
    CASE_NAMES,
    DIVERGENCE_CASES,
    SMOOTH_CASES,
    case_names,
    make_logits,
    make_upstream,
)


def dense_value_and_gradient(student, teacher, name, how, upstream):
    student = student.clone().requires_grad_()
    value = dense_divergence(student, teacher, name, **how)
    (value * upstream).sum().backward()
    return value.detach(), student.grad


@pytest.mark.parametrize(("name", "how"), DIVERGENCE_CASES, ids=CASE_NAMES)
@pytest.mark.parametrize(
    ("dtype", "scale", "bound"),
    [
        (torch.float64, 3.0, 1e-12),
        (torch.float32, 3.0, 1e-6),
        (torch.float32, 30.0, 2e-6),
        (torch.bfloat16, 3.0, 1e-6),
    ],
)
def test_value_and_gradient_are_those_of_float64(small_pieces, name, how, dtype, scale, bound):
    student, teacher = (z.to(dtype).double() for z in make_logits(scale=scale))
    upstream = make_upstream(len(student))
    want, want_grad = dense_value_and_gradient(student, teacher, name, how, upstream)
    mine = student.to(dtype).requires_grad_()
    loss = distill_loss(mine, teacher.to(dtype), divergence=name, **how)
    (loss * upstream.to(loss.dtype)).sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mine.grad.dtype == dtype
    assert relative_error(loss, want) <= min(bound, 1e-6)
    rounding = relative_error(want_grad.to(dtype), want_grad)  # of the result: about 2e-3 in bfloat16
    assert relative_error(mine.grad, want_grad) <= 1.01 * rounding + bound


@pytest.mark.parametrize(("name", "how"), SMOOTH_CASES, ids=case_names(SMOOTH_CASES))
def test_gradient_is_the_derivative_of_the_value(name, how):
    student, teacher = make_logits(tokens=3, vocab=7)
    loss = partial(distill_loss, teacher_TV=teacher, divergence=name, **how)
    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_models_have_exactly_zero_loss_and_gradient(small_pieces, name, dtype):
    student = make_logits(scale=10.0)[0].to(dtype).requires_grad_()
    loss = distill_loss(student, student.detach().clone(), divergence=name, temperature=1.3)
    loss.sum().backward()
    assert loss.eq(0).all()
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_columns_take_no_part_and_get_gradient_zero(name):
    student, teacher = make_logits(tokens=4, vocab=12)
    padded = torch.cat([student, torch.full((4, 4), 70.0)], -1).requires_grad_()
    garbage = torch.cat([teacher, torch.full((4, 4), math.nan)], -1)
    loss = distill_loss(padded, garbage, divergence=name, valid_vocab_size=12)
    loss.sum().backward()
    want, want_grad = dense_value_and_gradient(student, teacher, name, {}, torch.ones(4))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(padded.grad[:, :12], want_grad)
    assert padded.grad[:, 12:].eq(0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_entries_that_the_teacher_excludes(name):
    student, teacher = make_logits(tokens=4, vocab=12)
    teacher[:, 3] = -math.inf
    student[1, 5] = teacher[1, 5] = -math.inf
    want, want_grad = dense_value_and_gradient(student, teacher, name, {}, torch.ones(4))
    mine = student.clone().requires_grad_()
    loss = distill_loss(mine, teacher, divergence=name)
    if name in ("reverse_kl", "mixed_kl", "adaptive_kl"):
        assert loss.eq(math.inf).all()  # the true value
        return
    loss.sum().backward()
    torch.testing.assert_close(loss, want)
    finite = want_grad.isfinite()  # float64 autograd itself is NaN where q = 0
    assert mine.grad.isfinite().all()
    torch.testing.assert_close(mine.grad[finite], want_grad[finite])


def test_forward_kl_is_infinite_where_the_student_excludes_what_the_teacher_wants():
    student, teacher = make_logits(tokens=2, vocab=12)
    student[0, 3] = -math.inf
    loss = distill_loss(student, teacher, divergence="forward_kl")
    assert loss[0] == math.inf
    assert loss[1].isfinite()
    assert distill_loss(student, teacher, divergence="jsd").isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_bad_row_is_reported_in_its_own_row_only(name, bad, who):
    student, teacher = (z.float() for z in make_logits(tokens=4, vocab=12))
    clean = student.clone().requires_grad_()
    want = distill_loss(clean, teacher, divergence=name)
    want.sum().backward()
    broken = student if who == "student" else teacher
    if bad == -math.inf:
        broken[1] = bad  # no entry left
    else:
        broken[1, 7] = bad
    student.requires_grad_()
    loss = distill_loss(student, teacher, divergence=name)
    loss.sum().backward()
    others = torch.tensor([0, 2, 3])
    assert loss[1].isnan()
    assert not student.grad[1].isfinite().all()
    torch.testing.assert_close(loss[others], want[others], rtol=0, atol=0)
    torch.testing.assert_close(student.grad[others], clean.grad[others], rtol=0, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_of_ten_thousand_stay_finite(name):
    student, teacher = (z.float() for z in make_logits(tokens=4, vocab=12))
    student, teacher = student + 1e4, teacher - 1e4
    student[1], teacher[1] = -1e4, 1e4
    student[2, 0], teacher[2, 1] = -1e4, 1e4
    want, want_grad = dense_value_and_gradient(student.double(), teacher.double(), name, {}, torch.ones(4))
    student.requires_grad_()
    loss = distill_loss(student, teacher, divergence=name)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    rows = want.isfinite()  # the textbook form of KL is +inf once a probability underflows
    torch.testing.assert_close(loss[rows], want[rows].float(), rtol=1e-5, atol=1e-6)
    rows = want_grad.isfinite().all(-1) & rows
    torch.testing.assert_close(student.grad[rows], want_grad[rows].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_rows_give_an_empty_loss_and_gradient(name):
    student = torch.zeros(0, 12, requires_grad=True)
    loss = distill_loss(student, torch.zeros(0, 12), divergence=name)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert student.grad.shape == (0, 12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_only_vocabulary_sized_allocation_is_the_gradient(small_pieces, name):
    student, teacher = (z.float() for z in make_logits(tokens=40, vocab=500))
    student.requires_grad_()
    with counted() as forward:
        loss = distill_loss(student, teacher, divergence=name, temperature=1.5)
    bins = 40 * 66 if name == "adaptive_kl" else 0  # a histogram, whatever the vocabulary
    assert forward.largest_allocation <= max(3 * 500, bins)
    upstream = torch.ones(40)
    with counted() as backward:
        loss.backward(upstream)
    assert backward.largest_allocation == student.numel()
    assert student.grad.numel() == student.numel()


def test_logits_are_not_modified():
    student, teacher = make_logits()
    copies = student.clone(), teacher.clone()
    student.requires_grad_()
    for name in DIVERGENCES:
        distill_loss(student, teacher, divergence=name).sum().backward()
    assert student.equal(copies[0])
    assert teacher.equal(copies[1])


def test_a_new_divergence_is_one_function_and_one_line_in_the_table(monkeypatch):
    def squared_distance(log_p, log_q):
        difference = log_q.exp() - log_p.exp()
        return difference**2, 2 * difference * log_q.exp()

    monkeypatch.setitem(DIVERGENCES, "squared", lambda beta, alpha, weight: Separable(squared_distance))
    student, teacher = make_logits()
    whole = student.clone().requires_grad_()
    want = ((whole.softmax(-1) - teacher.softmax(-1)) ** 2).sum(-1)
    want.sum().backward()
    mine = student.float().requires_grad_()
    loss = distill_loss(mine, teacher.float(), divergence="squared")
    loss.sum().backward()
    assert relative_error(loss, want) <= 1e-6
    assert relative_error(mine.grad, whole.grad) <= 1e-6


def test_the_limit_makes_an_infinite_token_finite_and_takes_its_gradient():
    student, teacher = make_logits(tokens=3, vocab=12)
    teacher[1, 3] = -math.inf
    student.requires_grad_()
    loss = distill_loss(student, teacher, divergence="reverse_kl", max_token_loss=50.0)
    loss.sum().backward()
    assert loss[1] == 50
    assert student.grad[1].eq(0).all()
    assert student.grad[[0, 2]].ne(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_TV": torch.zeros(4, 13)},
            r"\(4, 12\) and teacher logits \(4, 13\).*make_vocab_size_divisible_by",
        ),
        ({"divergence": "jds"}, "unknown divergence 'jds'"),
        ({"temperature": 0.0}, r"temperature: should be greater than 0 \(got 0.0\)"),
        ({"teacher_temperature": -1.0}, r"teacher_temperature: should be greater than 0 \(got -1.0\)"),
        ({"max_token_loss": 0.0}, r"max_token_loss: should be greater than 0 \(got 0.0\)"),
        ({"valid_vocab_size": 13}, r"valid_vocab_size 13 is not in \[1, 12\]"),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(change, message):
    arguments = {
        "student_TV": torch.zeros(4, 12),
        "teacher_TV": torch.zeros(4, 12),
        "divergence": "jsd",
    } | change
    with pytest.raises(ValueError, match=message):
        distill_loss(**arguments)


def test_no_process_group_is_kept_alive():
    class Group:
        def size(self):
            return 1

    student, teacher = make_logits(tokens=3, vocab=20)
    group: Any = Group()
    distill_loss(student, teacher, divergence="jsd", group=group)
    alive = weakref.ref(group)
    del group
    gc.collect()
    assert alive() is None
