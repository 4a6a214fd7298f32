"""Divergences on a few entries of the vocabulary: known top-k, chosen supports, draws, and the sampled token.

Not covered here: split vocabularies and collectives (tests/distributed/test_split_vocabulary_sparse_loss.py).
"""

import math
from functools import partial

import pytest
import torch

from megatron_gkd.config.loss import LossSettings
from megatron_gkd.losses import (
    DistillLoss,
    distill_loss,
    linear_distill_loss,
    linear_top_k_distill_loss,
    top_k_distill_loss,
)
from megatron_gkd.losses.fused_linear import LMHead
from megatron_gkd.losses.verify.reference import (
    dense_divergence,
    dense_known,
    dense_support,
    dense_top_k,
    relative_error,
)
from tests.support.loss_cases import (
    SEPARABLE,
    TOP_K_CASES,
    make_known_entries,
    make_labels,
    make_linear_inputs,
    make_logits,
    make_upstream,
)

TAILS = ["bucket", "renormalize", "none"]
CASE_IDS = [f"{name} {how} {tail}" for name, how, tail in TOP_K_CASES]


pytestmark = pytest.mark.usefixtures("small_pieces")


def dense_value_and_gradient(student, entries, upstream, name, *, tail, how):
    student = student.clone().requires_grad_()
    value = dense_top_k(student, *dense_known(*entries, student.shape[1]), name, tail, **how)
    (value * upstream).sum().backward()
    return value.detach(), student.grad


@pytest.mark.parametrize(("name", "how", "tail"), TOP_K_CASES, ids=CASE_IDS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_top_k_value_and_gradient_are_those_of_float64(name, how, tail, dtype, bound):
    student, teacher = make_logits()
    student, upstream = student.to(dtype).double(), make_upstream(24)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    entries = make_known_entries(teacher, dtype=accumulated)
    want, want_grad = dense_value_and_gradient(student, entries, upstream, name, tail=tail, how=how)
    mine = student.to(dtype).requires_grad_()
    loss = top_k_distill_loss(mine, *entries, divergence=name, tail=tail, **how)
    (loss * upstream.to(loss.dtype)).sum().backward()
    assert loss.dtype == accumulated
    assert relative_error(loss, want) <= bound
    rounding = relative_error(want_grad.to(dtype), want_grad)
    assert relative_error(mine.grad, want_grad) <= 1.01 * rounding + bound


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"])
@pytest.mark.parametrize("tail", TAILS)
def test_top_k_gradient_is_the_derivative_of_the_value(name, tail):
    student, teacher = make_logits(tokens=3, vocab=7)
    entries = make_known_entries(teacher, most=3)
    loss = partial(top_k_distill_loss, ids_TK=entries[0], log_probs_TK=entries[1], divergence=name, tail=tail)
    assert torch.autograd.gradcheck(loss, student.requires_grad_())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["per token", "weighted sum"])
def test_hidden_states_give_the_gradients_of_their_logits(tail, is_weighted):
    inputs = make_linear_inputs()
    upstream = make_upstream(24)
    entries = make_known_entries(inputs.teacher_TH @ inputs.teacher_head_VH.T, dtype=torch.float32)
    student, head = (x.clone().requires_grad_() for x in inputs[:2])
    known = dense_known(*entries, 512)
    want = dense_top_k(student @ head.T, *known, "jsd", tail)
    (want * upstream).sum().backward()
    mine, my_head = (x.float().requires_grad_() for x in inputs[:2])
    options = {"token_weight_T": upstream.float()} if is_weighted else {}
    result = linear_top_k_distill_loss(
        mine, my_head, *entries, divergence="jsd", tail=tail, tokens_per_chunk=7, **options
    )
    total, loss = result if is_weighted else ((result * upstream).sum(), result)
    total.backward()
    for got, wanted in ((loss, want), (mine.grad, student.grad), (my_head.grad, head.grad)):
        assert relative_error(got, wanted) <= 1e-6


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_all_entries_known_is_the_divergence_itself(name):
    student, teacher = make_logits(vocab=64)
    entries = teacher.topk(64, -1).indices, teacher.log_softmax(-1).topk(64, -1).values
    want = dense_divergence(student, teacher, name)
    for tail in TAILS:
        loss = top_k_distill_loss(student, *entries, divergence=name, tail=tail)
        torch.testing.assert_close(loss, want)


def test_a_teacher_whose_rounded_mass_exceeds_one_stays_finite():
    student = torch.randn(2, 12, requires_grad=True)
    entries = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[-0.1, -0.1], [-1e-9, -20.0]])
    loss = top_k_distill_loss(student, *entries, divergence="reverse_kl")
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def assert_row_1_alone_is_bad(loss_of, clean, broken):
    """``loss_of(student, teacher)``: NaN in loss and gradient of row 1 of ``broken``, the other rows those of ``clean``."""
    (want, want_grad), (got, got_grad) = (loss_and_gradient(loss_of, *inputs) for inputs in (clean, broken))
    others = torch.tensor([0, 2, 3])
    for good, bad in ((want, got), (want_grad, got_grad)):
        assert bad[1].isnan().all()
        assert good.isfinite().all()
        assert bad[others].equal(good[others])


def loss_and_gradient(loss_of, student, teacher):
    student = student.clone().requires_grad_()
    torch.manual_seed(4)
    loss = loss_of(student, teacher)
    loss.sum().backward()
    return loss.detach(), student.grad


def with_bad_entry(tensor, column, bad):
    broken = tensor.clone()
    broken[1, column] = bad
    return broken


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["student", "student's others", "teacher"])
def test_a_bad_row_is_reported_in_its_own_row_only(name, tail, bad, who):
    student, teacher = (z.float() for z in make_logits(tokens=4, vocab=30))
    ids, log_probs = make_known_entries(teacher, most=5, dtype=torch.float32)
    broken = {
        "student": (with_bad_entry(student, ids[1, 0], bad), log_probs),
        "student's others": (with_bad_entry(student, teacher[1].argmin(), bad), log_probs),
        "teacher": (student, with_bad_entry(log_probs, 0, bad)),
    }[who]

    def loss_of(student, log_probs):
        return top_k_distill_loss(student, ids, log_probs, divergence=name, tail=tail)

    assert_row_1_alone_is_bad(loss_of, (student, log_probs), broken)


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize(
    "how",
    [
        *({"support": "teacher_top_k", "tail": tail} for tail in TAILS),
        {"support": "student_top_k"},
        {"support": "union"},
        {"support": "sampled"},
    ],
    ids=lambda how: " ".join(how.values()),
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_bad_row_is_reported_on_a_chosen_support(name, how, bad, who):
    student, teacher = (z.float() for z in make_logits(tokens=4, vocab=30))
    broken = {
        "student": (with_bad_entry(student, 7, bad), teacher),
        "teacher": (student, with_bad_entry(teacher, 7, bad)),
    }[who]

    def loss_of(student, teacher):
        return distill_loss(student, teacher, divergence=name, top_k=5, **how)

    assert_row_1_alone_is_bad(loss_of, (student, teacher), broken)


@pytest.mark.parametrize("support", ["teacher_top_k", "student_top_k", "union"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_chosen_support_is_a_top_k_of_the_models(support, tail, name):
    student, teacher = make_logits()
    masks = {"student_top_k": student, "teacher_top_k": teacher}
    masks = {key: torch.zeros(24, 512).scatter_(1, z.topk(9).indices, 1).bool() for key, z in masks.items()}
    masks["union"] = masks["student_top_k"] | masks["teacher_top_k"]
    whole = student.clone().requires_grad_()
    want = dense_top_k(whole, masks[support], teacher.softmax(-1), name, tail)
    want.sum().backward()
    mine = student.float().requires_grad_()
    loss = distill_loss(mine, teacher.float(), divergence=name, support=support, top_k=9, tail=tail)
    loss.sum().backward()
    assert relative_error(loss, want) <= 2e-6
    assert relative_error(mine.grad, whole.grad) <= 2e-6


def dense_on_support(student, teacher, support):
    """The reverse KL of a support of 9 entries; of ``sampled`` one whose head is the whole vocabulary."""
    if support == "sampled":
        return dense_divergence(student, teacher, "reverse_kl")
    mask = dense_support(student, teacher, support, 9)
    return dense_top_k(student, mask, teacher.softmax(-1), "reverse_kl", "bucket")


@pytest.mark.parametrize("support", ["teacher_top_k", "student_top_k", "union", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_support_is_chosen_among_more_columns_than_half_precision_can_count(support, dtype):
    student, teacher = (z.to(dtype) for z in make_logits(vocab=3000))
    tops = [z.topk(10).values for z in (student, teacher)]
    is_clear = (tops[0][:, 8] > tops[0][:, 9]) & (
        tops[1][:, 8] > tops[1][:, 9]
    )  # one answer to what the top 9 are
    student, teacher = student[is_clear], teacher[is_clear]
    assert len(student) >= 8
    whole = student.double().requires_grad_()
    want = dense_on_support(whole, teacher.double(), support)
    want.sum().backward()
    mine = student.clone().requires_grad_()
    top_k = 3000 if support == "sampled" else 9
    loss = distill_loss(mine, teacher, divergence="reverse_kl", support=support, top_k=top_k)
    loss.sum().backward()
    assert relative_error(loss, want) <= 2e-6
    rounding = relative_error(whole.grad.to(dtype), whole.grad)
    assert relative_error(mine.grad, whole.grad) <= 1.01 * rounding + 2e-6


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_sampled_support_estimates_value_and_gradient_without_bias(name):
    num_estimates = 2000
    student, teacher = make_logits(tokens=3, vocab=200)
    whole = student.clone().requires_grad_()
    want = dense_divergence(whole, teacher, name)
    want.sum().backward()
    torch.manual_seed(1)
    mine, other = (z.repeat_interleave(num_estimates, 0) for z in (student, teacher))
    mine.requires_grad_()
    loss = distill_loss(mine, other, divergence=name, support="sampled", top_k=8, num_draws=8)
    loss.sum().backward()
    estimates = loss.view(3, num_estimates)
    deviation = (estimates.mean(1) - want) / (estimates.std(1) / num_estimates**0.5)
    assert deviation.abs().max() < 4
    assert relative_error(mine.grad.view(3, num_estimates, -1).mean(1), whole.grad) < 0.1


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_have_no_sampled_loss_and_no_gradient(name, dtype):
    student = make_logits(vocab=300)[0].to(dtype)
    loss, grad = loss_and_gradient(
        partial(distill_loss, divergence=name, weight=0.3, support="sampled", top_k=8, num_draws=8),
        student,
        student.clone(),
    )
    assert loss.count_nonzero() == 0
    assert grad.count_nonzero() == 0


def test_the_reported_variance_is_that_of_the_estimate():
    inputs = make_linear_inputs(tokens=2, vocab=200)
    torch.manual_seed(2)
    repeated = [x.repeat_interleave(3000, 0) if i % 2 == 0 else x for i, x in enumerate(inputs)]
    settings = LossSettings(divergence="reverse_kl", support="sampled", top_k=8, num_draws=8)
    loss = DistillLoss(settings, tokens_per_chunk=1000)
    result = loss.weighted(LMHead(*repeated[:2]), LMHead(*repeated[2:]))
    reported = result.metrics["variance"].view(2, -1).mean(1)
    torch.testing.assert_close(reported, result.loss_T.view(2, -1).var(1), rtol=0.15, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("policy_gradient", [False, True], ids=["loss", "reward"])
def test_the_sampled_token_gives_its_estimator(estimator, policy_gradient):
    inputs = make_linear_inputs()
    labels = make_labels(24, 512)
    student, head = (x.clone().requires_grad_() for x in inputs[:2])
    rows = range(24)
    log_q = (student @ head.T / 1.5).log_softmax(-1)[rows, labels]
    u = log_q - (inputs.teacher_TH @ inputs.teacher_head_VH.T / 1.5).log_softmax(-1)[rows, labels]
    want = {"k1": u, "k2": u**2 / 2, "k3": (-u).exp() - 1 + u}[estimator]
    (want.detach() * log_q if policy_gradient else want).sum().backward()
    mine, my_head, *teacher = (x.float() for x in inputs)
    mine, my_head = mine.requires_grad_(), my_head.requires_grad_()
    loss = linear_distill_loss(
        mine,
        my_head,
        *teacher,
        labels_T=labels,
        divergence="reverse_kl",
        temperature=1.5,
        support="token",
        estimator=estimator,
        policy_gradient=policy_gradient,
    )
    loss.sum().backward()
    for got, wanted in ((loss, want), (mine.grad, student.grad), (my_head.grad, head.grad)):
        assert relative_error(got, wanted) <= 1e-6


def test_weights_make_repeated_draws_count():
    student, teacher = make_logits(tokens=4, vocab=12)
    student.requires_grad_()
    ids = torch.tensor([[3, 5, 5]]).repeat(4, 1)
    weights = torch.tensor([[1.0, 2.0, 0.5]]).double().repeat(4, 1)
    log_probs = teacher.log_softmax(-1).gather(1, ids)
    loss = top_k_distill_loss(
        student, ids, log_probs, weight_TK=weights, divergence="forward_kl", tail="none"
    )
    log_q = student.log_softmax(-1)
    want = (weights * log_probs.exp() * (log_probs - log_q.gather(1, ids))).sum(-1)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), student))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_TK": torch.zeros(4, 3, dtype=torch.int32)}, "int64 ids; fill shorter rows up with id -1"),
        ({"log_probs_TK": torch.zeros(4, 2)}, r"log-probabilities \(4, 2\)"),
        ({"student_TV": torch.zeros(5, 12)}, "do not fit 5 tokens of the student"),
        ({"weight_TK": torch.zeros(4, 3)}, "weights need tail=none, got bucket"),
        ({"tail": "drop"}, r"tail: should be 'bucket', 'renormalize' or 'none' \(got 'drop'\)"),
        ({"divergence": "adaptive_kl"}, "adaptive_kl .* needs support=full"),
        ({"support": "all"}, r"support: should be 'full', .* \(got 'all'\)"),
        ({"support": "token"}, "support=token estimates reverse_kl, but divergence=jsd"),
        ({"top_k": 0}, r"top_k: should be greater than or equal to 1 \(got 0\)"),
        ({"support": "union"}, "support=union chooses entries .* set support=teacher_top_k"),
        ({"support": "student_top_k"}, "support=student_top_k chooses entries"),
        ({"support": "sampled"}, "support=sampled chooses entries"),
        (
            {"support": "token", "divergence": "reverse_kl"},
            "support=token takes 1 entry per row, .* but 3 are given",
        ),
        ({"estimator": "k1"}, "estimator=k1 .* support=full ignores it; remove it or set support=token"),
        ({"policy_gradient": True, "support": "union"}, "policy_gradient=true .* support=union ignores it"),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(change, message):
    arguments = {
        "student_TV": torch.zeros(4, 12),
        "ids_TK": torch.zeros(4, 3, dtype=torch.int64),
        "log_probs_TK": torch.zeros(4, 3),
        "divergence": "jsd",
    } | change
    with pytest.raises(ValueError, match=message):
        top_k_distill_loss(**arguments)


def test_the_token_support_asks_for_labels():
    logits = torch.zeros(4, 12)
    with pytest.raises(ValueError, match="support=token needs labels_T"):
        distill_loss(logits, logits, divergence="reverse_kl", support="token")
