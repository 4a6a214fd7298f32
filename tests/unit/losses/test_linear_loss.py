"""``linear_distill_loss`` and ``linear_cross_entropy`` in one process: value and gradients of hidden states and head.

Not covered here: split vocabularies and collectives (tests/distributed/test_split_vocabulary_loss.py).
"""

from functools import partial

import pytest
import torch

from megatron_gkd.losses import DIVERGENCES, linear_cross_entropy, linear_distill_loss
from megatron_gkd.losses.verify.reference import dense_cross_entropy, dense_divergence, relative_error
from tests.support.counting import counted
from tests.support.loss_cases import (
    CASE_NAMES,
    DIVERGENCE_CASES,
    SMOOTH_CASES,
    LinearInputs,
    case_names,
    make_labels,
    make_linear_inputs,
    make_upstream,
)

CROSS_ENTROPY = ("cross_entropy", {})


pytestmark = pytest.mark.usefixtures("small_pieces")


class Case:
    """One loss of float64 inputs: dense, and ours in a given dtype."""

    def __init__(self, name, how, **shape):
        self.name, self.how = name, how
        self.inputs = make_linear_inputs(**shape)
        self.labels = make_labels(len(self.inputs.student_TH), len(self.inputs.student_head_VH))
        self.upstream = make_upstream(len(self.labels))

    def dense(self):
        """(loss_T, gradient of the hidden states, gradient of the head) of sum upstream * loss."""
        student, head = (x.clone().requires_grad_() for x in self.inputs[:2])
        logits = student @ head.T
        if self.name == "cross_entropy":
            loss = dense_cross_entropy(logits, self.labels)
        else:
            teacher_logits = self.inputs.teacher_TH @ self.inputs.teacher_head_VH.T
            loss = dense_divergence(logits, teacher_logits, self.name, **self.how)
        (loss * self.upstream).sum().backward()
        return loss.detach(), student.grad, head.grad

    def leaves(self, dtype):
        return tuple(x.to(dtype, copy=True).requires_grad_() for x in self.inputs[:2])

    def loss(self, student, head, **options):
        if self.name == "cross_entropy":
            return linear_cross_entropy(student, head, self.labels, **options)
        teacher, teacher_head = (x.to(student.dtype) for x in self.inputs[2:])
        return linear_distill_loss(
            student, head, teacher, teacher_head, divergence=self.name, **self.how, **options
        )


@pytest.mark.parametrize(
    ("name", "how"), [*DIVERGENCE_CASES, CROSS_ENTROPY], ids=[*CASE_NAMES, "cross_entropy"]
)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["per token", "weighted sum"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_value_and_both_gradients_are_those_of_float64(name, how, is_weighted, dtype, bound):
    case = Case(name, how)
    want, want_student, want_head = case.dense()
    for tokens_per_chunk in (7, 24, 256):
        student, head = case.leaves(dtype)
        upstream = case.upstream.to(dtype)
        if is_weighted:
            total, loss = case.loss(student, head, token_weight_T=upstream, tokens_per_chunk=tokens_per_chunk)
            assert not loss.requires_grad
            (3 * total).backward()
            torch.testing.assert_close(total.double(), (want * case.upstream).sum(), rtol=bound, atol=0)
        else:
            loss = case.loss(student, head, tokens_per_chunk=tokens_per_chunk)
            (3 * loss * upstream).sum().backward()
        assert loss.dtype == dtype
        assert relative_error(loss, want) <= bound
        assert relative_error(student.grad, 3 * want_student) <= bound
        assert relative_error(head.grad, 3 * want_head) <= bound


@pytest.mark.parametrize(("name", "how"), DIVERGENCE_CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["per token", "weighted sum"])
def test_biases_soft_caps_and_the_mix_with_cross_entropy(name, how, is_weighted):
    case = Case(name, how)
    student, head = (x.clone().requires_grad_() for x in case.inputs[:2])
    biases = make_linear_inputs(tokens=2).student_head_VH[:, :2].T.contiguous()
    bias = biases[0].clone().requires_grad_()
    teacher_logits = case.inputs.teacher_TH @ case.inputs.teacher_head_VH.T + biases[1]
    logits = student @ head.T + bias
    divergence = dense_divergence(logits, 5 * torch.tanh(0.5 * teacher_logits / 5), name, **how)
    want = 0.7 * divergence + 0.3 * dense_cross_entropy(logits, case.labels)
    (want * case.upstream).sum().backward()
    mine, my_head = case.leaves(torch.float32)
    my_bias = biases[0].float().requires_grad_()
    upstream = case.upstream.float()
    result = case.loss(
        mine,
        my_head,
        student_bias_V=my_bias,
        teacher_bias_V=biases[1].float(),
        teacher_scale=0.5,
        teacher_soft_cap=5.0,
        labels_T=case.labels,
        sft_weight=0.3,
        tokens_per_chunk=7,
        token_weight_T=upstream if is_weighted else None,
    )
    total, loss = result if is_weighted else ((result * upstream).sum(), result)
    total.backward()
    pairs = ((loss, want), (mine.grad, student.grad), (my_head.grad, head.grad), (my_bias.grad, bias.grad))
    assert max(relative_error(got, wanted) for got, wanted in pairs) <= 1e-6


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["per token", "weighted sum"])
def test_with_bfloat16_inputs_only_the_gradients_are_rounded(name, is_weighted):
    case = Case(name, {})
    want, want_student, want_head = case.dense()
    student, head = case.leaves(torch.bfloat16)
    upstream = case.upstream.float()
    if is_weighted:
        total, loss = case.loss(student, head, token_weight_T=upstream, tokens_per_chunk=7)
    else:
        loss = case.loss(student, head, tokens_per_chunk=7)
        total = (loss * upstream).sum()
    (total / 3).backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == head.grad.dtype == torch.bfloat16
    assert relative_error(loss, want) <= 1e-6
    assert relative_error(student.grad, want_student / 3) <= 2e-3
    assert relative_error(head.grad, want_head / 3) <= 2e-3


@pytest.mark.parametrize(
    ("name", "how"), [*SMOOTH_CASES, CROSS_ENTROPY], ids=[*case_names(SMOOTH_CASES), "cross_entropy"]
)
def test_both_gradients_are_the_derivatives_of_the_value(name, how):
    case = Case(name, how, tokens=3, vocab=5, hidden=2, teacher_hidden=3)
    leaves = case.leaves(torch.float64)
    assert torch.autograd.gradcheck(partial(case.loss, tokens_per_chunk=2), leaves)
    weighted = partial(case.loss, tokens_per_chunk=2, token_weight_T=case.upstream)
    assert torch.autograd.gradcheck(lambda *inputs: weighted(*inputs)[0], leaves)


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["per token", "weighted sum"])
def test_no_allocation_holds_the_logits_of_all_tokens(name, is_weighted):
    case = Case(name, {}, tokens=64, vocab=1024, hidden=8, teacher_hidden=8)
    student, head = case.leaves(torch.float32)
    options = {"token_weight_T": case.upstream.float()} if is_weighted else {}
    with counted() as counts:
        result = case.loss(student, head, tokens_per_chunk=8, **options)
        (result[0] if is_weighted else result.sum()).backward()
    assert counts.largest_allocation == 8 * 1024  # logits of one chunk, or the head's gradient


def peak_bytes(name, tokens, vocab, tokens_per_chunk=16):
    """The most that lives beside the inputs, in forward and backward with hidden states of 8 numbers."""
    case = Case(name, {}, tokens=tokens, vocab=vocab, hidden=8, teacher_hidden=8)
    case.inputs = LinearInputs(*(x.float() for x in case.inputs))
    student, head = case.leaves(torch.float32)
    options = {} if name == "cross_entropy" else {"backend": "eager"}
    weight = case.upstream.float()
    with counted() as counts:
        total, _ = case.loss(
            student, head, tokens_per_chunk=tokens_per_chunk, token_weight_T=weight, **options
        )
        total.backward()
    return counts.peak_bytes


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_the_peak_of_memory_grows_with_the_vocabulary_and_not_with_the_tokens(name):
    peak = peak_bytes(name, 64, 1024)
    per_token = (peak_bytes(name, 128, 1024) - peak) / 64
    assert per_token <= 4 * (8 + 4)  # the gradient of the hidden states, the loss and its details
    assert 1.8 <= peak_bytes(name, 64, 2048) / peak <= 2.2
    assert peak_bytes(name, 64, 1024, tokens_per_chunk=32) >= 1.4 * peak  # the peak is that of a chunk


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_padding_rows_of_the_head_take_no_part_and_get_gradient_zero(name):
    case = Case(name, {}, vocab=100)
    want, want_student, want_head = case.dense()
    for options in ({}, {"token_weight_T": case.upstream}):
        student, head = case.leaves(torch.float64)
        padding = torch.full((28, head.shape[1]), 50.0, dtype=torch.float64)
        padded = torch.cat([head.detach(), padding]).requires_grad_()
        case.inputs = case.inputs._replace(
            teacher_head_VH=torch.cat([case.inputs.teacher_head_VH[:100], torch.full((28, 64), torch.nan)])
        )
        result = case.loss(student, padded, valid_vocab_size=100, **options)
        (result[0] if options else (result * case.upstream).sum()).backward()
        torch.testing.assert_close(result[1] if options else result, want)
        torch.testing.assert_close(student.grad, want_student)
        torch.testing.assert_close(padded.grad[:100], want_head)
        assert padded.grad[100:].eq(0).all()


@pytest.mark.parametrize("name", [*DIVERGENCES, "cross_entropy"])
def test_zero_rows_give_loss_zero_and_zero_gradients(name):
    case = Case(name, {}, vocab=20)
    case.inputs = case.inputs._replace(
        student_TH=case.inputs.student_TH[:0], teacher_TH=case.inputs.teacher_TH[:0]
    )
    case.labels = case.labels[:0]
    for options in ({}, {"token_weight_T": torch.zeros(0)}):
        student, head = case.leaves(torch.float32)
        result = case.loss(student, head, **options)
        (result[0] if options else result.sum()).backward()
        assert (result[1] if options else result).shape == (0,)
        assert student.grad.shape == student.shape
        assert head.grad.shape == head.shape
        assert head.grad.eq(0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_models_have_exactly_zero_loss_and_gradients(name):
    inputs = make_linear_inputs()
    student, head = (x.float().requires_grad_() for x in inputs[:2])
    total, loss = linear_distill_loss(
        student,
        head,
        student.detach().clone(),
        head.detach().clone(),
        divergence=name,
        tokens_per_chunk=7,
        token_weight_T=torch.ones(len(student)),
    )
    total.backward()
    assert loss.eq(0).all()
    assert student.grad.eq(0).all()
    assert head.grad.eq(0).all()


@pytest.mark.parametrize("frozen", ["student", "head"])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["per token", "weighted sum"])
def test_a_frozen_input_gets_no_gradient_and_the_other_its_own(frozen, is_weighted):
    case = Case("jsd", {})
    _, want_student, want_head = case.dense()
    student, head = case.leaves(torch.float64)
    (student if frozen == "student" else head).requires_grad_(False)
    if is_weighted:
        total, _ = case.loss(student, head, token_weight_T=case.upstream)
    else:
        total = (case.loss(student, head) * case.upstream).sum()
    total.backward()
    if frozen == "student":
        assert student.grad is None
        torch.testing.assert_close(head.grad, want_head)
    else:
        assert head.grad is None
        torch.testing.assert_close(student.grad, want_student)


def test_evaluation_makes_no_gradient():
    case = Case("jsd", {}, tokens=64, vocab=1024, hidden=8, teacher_hidden=8)
    student, head, *teacher = (x.float().requires_grad_() for x in case.inputs)
    weight = case.upstream.float()
    with torch.no_grad(), counted() as counts:
        total, loss = linear_distill_loss(
            student, head, *teacher, divergence="jsd", token_weight_T=weight, tokens_per_chunk=4
        )
    assert counts.largest_allocation == 4 * 1024  # no [V, H]
    torch.testing.assert_close(total, (loss * weight).sum())


def test_a_second_backward_adds_the_same_gradients_again():
    case = Case("forward_kl", {})
    student, head = case.leaves(torch.float64)
    total, _ = case.loss(student, head, token_weight_T=case.upstream)
    total.backward(retain_graph=True)
    once = student.grad.clone(), head.grad.clone()
    total.backward()
    torch.testing.assert_close((student.grad, head.grad), (2 * once[0], 2 * once[1]))


def test_a_boolean_mask_is_a_token_weight():
    case = Case("forward_kl", {})
    student, head = case.leaves(torch.float64)
    mask = torch.arange(24) % 3 == 0
    total, loss = case.loss(student, head, token_weight_T=mask)
    torch.testing.assert_close(total, loss[mask].sum())


def test_a_label_that_is_no_vocabulary_entry_has_infinite_loss():
    case = Case("cross_entropy", {}, tokens=4, vocab=20)
    case.labels = torch.tensor([3, -100, 19, 20])
    loss = case.loss(*case.leaves(torch.float32), valid_vocab_size=19)
    assert loss.isinf().tolist() == [False, True, True, True]


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_TH": zeros(4, 7)}, r"student hidden states \(4, 7\) and head \(12, 6\)"),
        ({"teacher_TH": zeros(4, 2, 8)}, r"teacher hidden states \(4, 2, 8\).*flatten"),
        ({"teacher_TH": zeros(5, 8)}, r"student hidden \(4, 6\).*teacher hidden \(5, 8\).*same tokens"),
        ({"teacher_head_VH": zeros(13, 8)}, r"head \(13, 8\).*pad the teacher's head"),
        (
            {"student_TH": zeros(4, 6, dtype=torch.bfloat16)},
            "torch.bfloat16 but its head is torch.float32; cast",
        ),
        ({"token_weight_T": zeros(5)}, r"token_weight_T \(5,\) does not fit hidden states \(4, 6\)"),
        ({"student_bias_V": zeros(11)}, r"student bias \(11,\) does not fit its head \(12, 6\)"),
        ({"sft_weight": 0.5}, "sft_weight 0.5 needs labels_T"),
        ({"sft_weight": 1.5}, r"sft_weight 1.5 .* lies in \[0, 1\]"),
        ({"tokens_per_chunk": 0}, "tokens_per_chunk 0 is not at least 1"),
        ({"valid_vocab_size": 0}, r"valid_vocab_size 0 is not in \[1, 12\]"),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(change, message):
    arguments = {
        "student_TH": zeros(4, 6),
        "student_head_VH": zeros(12, 6),
        "teacher_TH": zeros(4, 8),
        "teacher_head_VH": zeros(12, 8),
        "divergence": "jsd",
    }
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(**(arguments | change))


def test_labels_of_a_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"labels \(4,\) torch.int32 .* one int64 token id per row"):
        linear_cross_entropy(zeros(4, 6), zeros(12, 6), zeros(4, dtype=torch.int32))
