"""Digits in float32 where they are easily lost: similar models, peaked models, and rows that do not count.

Not covered here: Triton's kernels (test_triton_kernels.py), process groups (tests/distributed/test_split_vocabulary_loss.py).
"""

import math
from itertools import pairwise

import pytest
import torch

from megatron_gkd.losses import DIVERGENCES, distill_loss, linear_cross_entropy, linear_distill_loss
from megatron_gkd.losses.dense import make_dense_loss
from megatron_gkd.losses.divergences import make_divergence
from megatron_gkd.losses.verify.reference import dense_divergence, relative_error
from megatron_gkd.losses.vocab_parallel import Temperatures
from tests.support.loss_cases import (
    SEPARABLE,
    make_independent_logits,
    make_labels,
    make_linear_inputs,
    make_logits,
    make_similar_logits,
)
from tests.unit.losses.test_rounds import FakeGroup, in_step

pytestmark = pytest.mark.timeout(300)

KLS = ("forward_kl", "reverse_kl", "mixed_kl")


def value_and_gradient(name, student, teacher, *, backend, tp):
    """(loss_T, gradient [T, V]) in float32, the vocabulary split evenly over ``tp`` ranks in one process."""
    divergence = make_divergence(name, beta=0.5, alpha=0.1, weight=0.5)
    bounds = [student.shape[1] * rank // tp for rank in range(tp + 1)]
    shards = [(student[:, a:b].float(), teacher[:, a:b].float()) for a, b in pairwise(bounds)]
    losses = [
        make_dense_loss(divergence, Temperatures(1.0, 1.0), FakeGroup(rank, tp), backend)
        for rank in range(tp)
    ]
    results = in_step([loss.rounds(x, y) for loss, (x, y) in zip(losses, shards, strict=True)])
    upstream = torch.ones(len(student))
    parts = zip(losses, shards, results, strict=True)
    grads = [loss.gradient(x, y, saved, upstream) for loss, (x, y), (_, saved) in parts]
    return results[0][0], torch.cat(grads, -1)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("distance", "kl", "bound"), [(1e-3, 5e-7, 1e-4), (1e-4, 5e-9, 1e-2)])
def test_the_kl_of_similar_models_keeps_its_digits(name, backend, tp, distance, kl, bound):
    student, teacher = make_similar_logits(tokens=64, vocab=2000, distance=distance)
    want = dense_divergence(student, teacher, name)
    assert want.mean() == pytest.approx(kl, rel=0.2)
    loss, _ = value_and_gradient(name, student, teacher, backend=backend, tp=tp)
    assert loss.ge(0).all()
    assert relative_error(loss, want) <= bound


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("num_similar", [1, 5])
def test_similar_and_other_models_keep_their_digits_in_one_batch(name, backend, num_similar):
    student, teacher = make_independent_logits(tokens=8, vocab=2000, std=3.0)
    student[:num_similar], teacher[:num_similar] = make_similar_logits(num_similar, 2000, distance=1e-3)
    want = dense_divergence(student, teacher, name)
    loss, _ = value_and_gradient(name, student, teacher, backend=backend, tp=2)
    assert relative_error(loss[:num_similar], want[:num_similar]) <= 1e-4
    assert relative_error(loss[num_similar:], want[num_similar:]) <= 1e-6


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_kl_of_distant_models_keeps_its_digits(name, tp):
    student, teacher = make_independent_logits(tokens=64, vocab=2000, std=30.0)
    loss, _ = value_and_gradient(name, student, teacher, backend="eager", tp=tp)
    assert relative_error(loss, dense_divergence(student, teacher, name)) <= 1e-6


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("std", "bound"), [(8.0, 2e-6), (16.0, 2e-5)])
def test_gradients_of_independent_peaked_models(name, backend, tp, std, bound):
    student, teacher = make_independent_logits(tokens=64, vocab=2000, std=std)
    student.requires_grad_()
    dense_divergence(student, teacher, name).sum().backward()
    _, grad = value_and_gradient(name, student.detach(), teacher, backend=backend, tp=tp)
    assert relative_error(grad, student.grad) <= bound


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_the_kl_of_models_that_are_somewhat_alike(name, backend):
    for distance in (0.1, 0.3, 0.6):
        student, teacher = make_similar_logits(tokens=32, vocab=2000, distance=distance)
        loss, _ = value_and_gradient(name, student, teacher, backend=backend, tp=1)
        assert relative_error(loss, dense_divergence(student, teacher, name)) <= 1e-6


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_far_below_the_largest_logit_is_not_excluded(name, tp):
    student, teacher = make_independent_logits(tokens=16, vocab=64, std=1e4)
    want = value_and_gradient(name, student, teacher, backend="eager", tp=1)
    got = value_and_gradient(name, student, teacher, backend="eager", tp=tp)
    assert want[0].isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SEPARABLE)
def test_the_values_of_independent_peaked_models(name):
    student, teacher = make_independent_logits(tokens=64, vocab=2000, std=16.0)
    loss, _ = value_and_gradient(name, student, teacher, backend="eager", tp=1)
    assert relative_error(loss, dense_divergence(student, teacher, name)) <= 1e-6


@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("columns", [[7, 250], [0, 60, 120, 180, 240]])
def test_several_entries_may_share_the_largest_logit(name, backend, columns):
    student, teacher = make_independent_logits(tokens=16, vocab=300, std=8.0)
    student[:, columns] = student.amax(-1, keepdim=True)
    student.requires_grad_()
    dense_divergence(student, teacher, name).sum().backward()
    _, grad = value_and_gradient(name, student.detach(), teacher, backend=backend, tp=2)
    assert relative_error(grad, student.grad) <= 2e-6


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_of_weight_0_adds_0_and_has_gradient_0(name, bad):
    inputs = make_linear_inputs(tokens=6, vocab=40)
    hidden, head = inputs.student_TH.clone(), inputs.student_head_VH.clone().requires_grad_()
    hidden[2] = bad
    hidden.requires_grad_()
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0], dtype=torch.float64)

    def total_of(hidden, teacher_hidden, labels, weight):
        options = {"token_weight_T": weight, "tokens_per_chunk": 2}
        if name == "cross_entropy":
            return linear_cross_entropy(hidden, head, labels, **options)[0]
        return linear_distill_loss(
            hidden, head, teacher_hidden, inputs.teacher_head_VH, divergence=name, **options
        )[0]

    labels, counted = make_labels(6, 40), torch.arange(6) != 2
    total = total_of(hidden, inputs.teacher_TH, labels, weight)
    got = torch.autograd.grad(total, (hidden, head))
    rest = hidden.detach()[counted].requires_grad_()
    want_total = total_of(rest, inputs.teacher_TH[counted], labels[counted], weight[counted])
    want = torch.autograd.grad(want_total, (rest, head))
    torch.testing.assert_close(total, want_total)
    assert got[0][2].eq(0).all()
    torch.testing.assert_close(got[0][counted], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_infinite_row_of_given_logits_may_have_weight_0(name):
    student, teacher = make_logits(tokens=4, vocab=40)
    teacher[1, 3] = -math.inf  # an infinite reverse KL
    student[2, 5] = math.nan
    student.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0])
    options = {"divergence": name, "token_weight_T": weight, "overwrite_logits": True}
    total, loss = distill_loss(student * 1, teacher.clone(), **options)
    total.backward()
    torch.testing.assert_close(total, loss[[0, 3]].sum())
    assert student.grad[1:3].eq(0).all()
    assert student.grad[[0, 3]].ne(0).any(-1).all()


def test_an_upstream_gradient_of_0_gives_gradient_0():
    student, teacher = make_logits(tokens=4, vocab=40)
    student[2, 5] = math.nan
    student.requires_grad_()
    loss = distill_loss(student, teacher, divergence="jsd")
    loss[[0, 1, 3]].sum().backward()
    assert student.grad[2].eq(0).all()
    assert student.grad[[0, 1, 3]].isfinite().all()
