"""The divergences as pure functions.

Not covered here: gradients with respect to logits and split vocabularies (test_distill_loss.py, tests/distributed).
"""

import math
from typing import get_args

import pytest
import torch

from megatron_gkd.config.loss import Backend, Divergence, LossConfig
from megatron_gkd.losses import DIVERGENCES
from megatron_gkd.losses.divergences import ESTIMATORS, WeightedKL, make_divergence, make_estimator
from megatron_gkd.losses.kernels import BACKENDS
from megatron_gkd.losses.verify.reference import dense_formula
from tests.support.loss_cases import SEPARABLE, make_logits

PARAMETERS = {"beta": 0.3, "alpha": 0.1, "weight": 0.4}


def make_log_probs():
    student, teacher = make_logits(tokens=6, vocab=40)
    return teacher.log_softmax(-1), student.log_softmax(-1)


@pytest.mark.parametrize("name", SEPARABLE)
def test_entries_add_up_to_the_textbook_divergence(name):
    log_p, log_q = make_log_probs()
    value, _ = make_divergence(name, **PARAMETERS)(log_p, log_q)
    torch.testing.assert_close(value.sum(-1), dense_formula(log_p.exp(), log_q.exp(), name, **PARAMETERS))


@pytest.mark.parametrize("name", SEPARABLE)
def test_r_is_the_derivative_of_the_value(name):
    log_p, log_q = make_log_probs()
    divergence = make_divergence(name, **PARAMETERS)
    _value, r = divergence(log_p, log_q)
    step = 1e-6
    moved, _ = divergence(log_p, log_q + step)
    before, _ = divergence(log_p, log_q - step)
    torch.testing.assert_close(r, (moved - before) / (2 * step), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SEPARABLE)
def test_the_offset_is_what_the_value_has_beside_the_textbook_form(name):
    log_p, log_q = (x[:, :7] for x in make_log_probs())  # a part of the vocabulary
    divergence = make_divergence(name, **PARAMETERS)
    value, _ = divergence(log_p, log_q)
    plain = value - divergence.offset * (log_q.exp() - log_p.exp())
    torch.testing.assert_close(plain.sum(-1), dense_formula(log_p.exp(), log_q.exp(), name, **PARAMETERS))


@pytest.mark.parametrize("name", SEPARABLE)
def test_entries_of_equal_models_are_exactly_zero_in_value(name):
    log_p = torch.randn(4, 100).log_softmax(-1)
    value, _ = make_divergence(name, **PARAMETERS)(log_p, log_p.clone())
    assert value.eq(0).all()


def test_jsd_keeps_its_accuracy_for_almost_equal_models():
    log_q = torch.randn(4, 100, dtype=torch.float64).log_softmax(-1)
    log_p = (log_q + 1e-5 * torch.randn(4, 100, dtype=torch.float64)).log_softmax(-1)
    value, r = make_divergence("jsd", beta=0.5)(log_p, log_q)
    d = log_p - log_q  # second order: JSD = sum q d^2 / 8, r = -q d / 4 up to a relative d
    torch.testing.assert_close(value.sum(-1), (log_q.exp() * d**2 / 8).sum(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(r, -log_q.exp() * d / 4, rtol=1e-4, atol=0)


def test_jsd_at_its_end_points_is_forward_and_reverse_kl():
    assert make_divergence("jsd", beta=0.0) == make_divergence("forward_kl") == WeightedKL(1.0, 0.0)
    assert make_divergence("jsd", beta=1.0) == make_divergence("reverse_kl") == WeightedKL(0.0, 1.0)


@pytest.mark.parametrize("name", SEPARABLE)
def test_an_entry_that_both_exclude_contributes_nothing(name):
    log_p = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]])
    log_q = torch.tensor([[math.log(0.9), math.log(0.1), -math.inf]])
    value, r = make_divergence(name, **PARAMETERS)(log_p, log_q)
    assert value[0, 2] == 0
    assert r[0, 2] == 0
    assert value.isfinite().all()
    assert r.isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl", "one of forward_kl, reverse_kl, jsd"),
        ("jsd", r"beta in \[0, 1\], got 1.5"),
        ("skew_forward_kl", r"skew_forward_kl needs alpha in \[0, 1\), got 1.0"),
        ("skew_reverse_kl", r"skew_reverse_kl needs alpha in \[0, 1\), got 1.0"),
        ("mixed_kl", r"weight in \[0, 1\], got -0.5"),
    ],
)
def test_a_wrong_name_or_parameter_is_named_with_the_fix(name, message):
    with pytest.raises(ValueError, match=message):
        make_divergence(name, beta=1.5, alpha=1.0, weight=-0.5)


def test_a_weighted_kl_without_a_direction_is_refused():
    with pytest.raises(ValueError, match="at least one direction"):
        WeightedKL(0.0, 0.0)


def test_the_configuration_knows_the_same_names():
    assert get_args(Divergence) == tuple(DIVERGENCES)
    assert get_args(Backend) == BACKENDS
    assert get_args(LossConfig.model_fields["estimator"].annotation) == tuple(ESTIMATORS)


@pytest.mark.parametrize("policy_gradient", [False, True])
def test_an_unknown_estimator_is_named_with_the_fix(policy_gradient):
    with pytest.raises(ValueError, match=r"unknown estimator 'k4'; loss\.estimator is one of k1, k2, k3"):
        make_estimator("k4", policy_gradient=policy_gradient)
