"""The loss of a micro-batch: its targets, its metrics, and what is refused.

Not covered here: whole updates (tests/distributed/test_student_step.py).
"""

import pytest
import torch

from megatron_gkd.config import LossConfig
from megatron_gkd.losses.fused_linear import LMHead
from megatron_gkd.losses.token_loss import METRIC_UNITS
from megatron_gkd.losses.verify.reference import dense_cross_entropy, dense_divergence
from megatron_gkd.teacher.base import HiddenSignal, NoTeacher, TopKSignal
from megatron_gkd.train.loss import RunLoss, lost_mass_warning
from tests.support.loss_cases import make_labels, make_linear_inputs

VOCAB, TOKENS = 60, 6


def compute(signal, head, labels=None, **section):
    inputs = make_linear_inputs(tokens=TOKENS, vocab=VOCAB)
    student = LMHead(inputs.student_TH.clone().requires_grad_(), inputs.student_head_VH)
    labels = make_labels(TOKENS, VOCAB) if labels is None else labels
    config = LossConfig(**section)
    result = RunLoss(config, None, VOCAB, head)(student, signal, labels)
    assert set(result.metrics) <= set(METRIC_UNITS)
    return result, result.metrics


def dense_logits():
    inputs = make_linear_inputs(tokens=TOKENS, vocab=VOCAB)
    return inputs.student_TH @ inputs.student_head_VH.T, inputs.teacher_TH @ inputs.teacher_head_VH.T


def hidden_signal():
    inputs = make_linear_inputs(tokens=TOKENS, vocab=VOCAB)
    return HiddenSignal(inputs.teacher_TH), inputs.teacher_head_VH


def top_k_signal(k):
    log_p, ids = dense_logits()[1].log_softmax(-1).topk(k, -1)
    return TopKSignal(ids, log_p, token_log_prob_T=log_p[:, 0])


def test_the_parts_of_a_mix_are_metrics_beside_the_loss():
    signal, head = hidden_signal()
    result, metrics = compute(signal, head, divergence="jsd", beta=0.3, sft_weight=0.25)
    student, teacher = dense_logits()
    divergence = dense_divergence(student, teacher, "jsd", beta=0.3)
    cross_entropy = dense_cross_entropy(student, make_labels(TOKENS, VOCAB))
    torch.testing.assert_close(metrics["divergence"], divergence)
    torch.testing.assert_close(metrics["cross_entropy"], cross_entropy)
    torch.testing.assert_close(result.loss_T, 0.75 * divergence + 0.25 * cross_entropy)
    torch.testing.assert_close(result.total, result.loss_T.sum())


def test_the_teachers_logits_are_scaled_and_bounded_as_declared():
    signal, head = hidden_signal()
    result, _ = compute(signal, head, teacher_logit_scale=0.5, teacher_logit_soft_cap=2.0)
    student, teacher = dense_logits()
    want = dense_divergence(student, 2 * torch.tanh(teacher * 0.5 / 2), "forward_kl")
    torch.testing.assert_close(result.loss_T, want)


def test_without_a_teacher_the_loss_is_the_cross_entropy():
    assert NoTeacher().score(None, []) == []
    result, metrics = compute(None, None, sft_weight=1.0)
    torch.testing.assert_close(
        result.loss_T, dense_cross_entropy(dense_logits()[0], make_labels(TOKENS, VOCAB))
    )
    assert list(metrics) == ["cross_entropy"]


def test_all_entries_of_a_top_k_are_the_whole_distribution():
    student, teacher = dense_logits()
    result, metrics = compute(top_k_signal(VOCAB), None, support="teacher_top_k", divergence="reverse_kl")
    torch.testing.assert_close(result.loss_T, dense_divergence(student, teacher, "reverse_kl"))
    torch.testing.assert_close(metrics["retained_mass"], torch.ones(TOKENS, dtype=torch.float64))


def test_the_log_probability_of_the_token_is_enough_for_an_estimator():
    signal = top_k_signal(3)
    result, _ = compute(
        signal, None, labels=signal.ids_TK[:, 0], support="token", divergence="reverse_kl", estimator="k1"
    )
    log_q_T = dense_logits()[0].log_softmax(-1).gather(1, signal.ids_TK[:, :1]).squeeze(-1)
    torch.testing.assert_close(result.loss_T, log_q_T - signal.token_log_prob_T)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("signal", [hidden_signal(), (top_k_signal(3), None)], ids=["hidden", "top-k"])
def test_the_probability_of_a_token_is_no_retained_mass(signal, estimator):
    section = {"divergence": "reverse_kl", "support": "token", "estimator": estimator}
    _, metrics = compute(*signal, **section)
    assert list(metrics) == ["divergence"]
    means = {name: values.mean().item() for name, values in metrics.items()}
    assert lost_mass_warning(means, LossConfig(**section)) is None


@pytest.mark.parametrize("support", ["full", "student_top_k", "union", "sampled"])
def test_a_top_k_teacher_cannot_be_asked_for_other_entries(support):
    with pytest.raises(
        ValueError, match=rf"loss\.support={support} needs a teacher whose whole distribution"
    ):
        compute(top_k_signal(3), None, support=support)


@pytest.mark.parametrize(
    ("divergence", "mass", "is_told"),
    [
        ("reverse_kl", 0.97, True),
        ("reverse_kl", 0.98, False),
        ("forward_kl", 0.5, False),
        ("mixed_kl", 0.5, True),
    ],
)
def test_lost_mass_is_told_for_reverse_directions(divergence, mass, is_told):
    message = lost_mass_warning({"retained_mass": mass}, LossConfig(divergence=divergence))
    assert (message is not None) == is_told
    assert lost_mass_warning({}, LossConfig(divergence=divergence)) is None
