"""The learning rate of an iteration is the textbook one, whatever was asked before."""

import math

import pytest

from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.optim.optimizer import LearningRateSchedule

ITERS = 20


class StandInOptimizer:
    def __init__(self):
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.1, "wd_mult": 1.0}, {"lr": 0.0, "wd_mult": 0.0}]


def linear(x: float) -> float:
    return 1 - x


def half_cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def rates_of(config: OptimConfig, iterations=range(ITERS)) -> list[float]:
    optimizer = StandInOptimizer()
    schedule = LearningRateSchedule(optimizer, config, ITERS)
    rates = []
    for iteration in iterations:
        rates.append(schedule.set_iteration(iteration))
        assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
    return rates


def with_warmup(config: OptimConfig, warmup: int, after) -> list[float]:
    """lr * step / warmup, then ``after(step)``; steps count from 1."""
    return [config.lr * s / warmup if s <= warmup else after(s) for s in range(1, ITERS + 1)]


@pytest.mark.parametrize(("style", "shape"), [("linear", linear), ("cosine", half_cosine)])
@pytest.mark.parametrize("warmup", [0, 1, 4, ITERS])
@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_linear_and_cosine_reach_the_minimum_one_iteration_after_the_last(style, shape, warmup, min_lr):
    config = OptimConfig(lr=1e-3, min_lr=min_lr, decay_style=style, warmup_iters=warmup)
    expected = with_warmup(
        config, warmup, lambda s: min_lr + (1e-3 - min_lr) * shape((s - warmup) / (ITERS + 1 - warmup))
    )
    rates = rates_of(config)
    assert rates == pytest.approx(expected, rel=1e-9)
    assert min(rates) > 0, "an iteration would be spent without an update"


@pytest.mark.parametrize("warmup", [0, 1, 4, ITERS])
def test_constant_keeps_the_rate_after_warm_up(warmup):
    config = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_iters=warmup)
    assert rates_of(config) == pytest.approx(with_warmup(config, warmup, lambda s: 1e-3), rel=1e-9)


@pytest.mark.parametrize("warmup", [0, 1, 4, ITERS])
@pytest.mark.parametrize("min_lr", [0.0, 5e-4])
def test_inverse_square_root_continues_the_warm_up_and_stops_at_the_minimum(warmup, min_lr):
    config = OptimConfig(lr=1e-3, min_lr=min_lr, decay_style="inverse_square_root", warmup_iters=warmup)
    expected = with_warmup(config, warmup, lambda s: max(min_lr, 1e-3 * math.sqrt(max(warmup, 1) / s)))
    assert rates_of(config) == pytest.approx(expected, rel=1e-9)


SHAPES = {
    "linear": linear,
    "cosine": half_cosine,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


@pytest.mark.parametrize("style", SHAPES)
@pytest.mark.parametrize(
    ("warmup", "fraction", "decay"), [(0, 1.0, 20), (4, 0.3, 6), (4, 0.8, 16), (3, 0.01, 1)]
)
def test_wsd_is_stable_between_warm_up_and_its_last_iterations(style, warmup, fraction, decay):
    config = OptimConfig(
        lr=1e-3,
        min_lr=1e-4,
        decay_style="wsd",
        warmup_iters=warmup,
        wsd_decay_fraction=fraction,
        wsd_decay_style=style,
    )

    def after(step: int) -> float:
        progress = max(0, step - (ITERS - decay)) / (decay + 1)
        return 1e-4 + 9e-4 * SHAPES[style](progress)

    rates = rates_of(config)
    assert rates == pytest.approx(with_warmup(config, warmup, after), rel=1e-9)
    assert sum(rate == 1e-3 for rate in rates) == ITERS - max(warmup - 1, 0) - decay


@pytest.mark.parametrize(("fraction", "warmup"), [(0.0, 0), (0.15, 3), (0.16, 3), (1.0, ITERS)])
def test_a_share_of_warm_up_is_its_number_of_iterations(fraction, warmup):
    by_share = OptimConfig(lr=1e-3, decay_style="cosine", warmup_fraction=fraction)
    by_number = OptimConfig(lr=1e-3, decay_style="cosine", warmup_iters=warmup)
    assert rates_of(by_share) == rates_of(by_number)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse_square_root", "wsd"])
def test_the_rate_depends_on_the_iteration_alone(style):
    config = OptimConfig(lr=1e-3, min_lr=1e-4, decay_style=style, warmup_iters=3)
    in_order = rates_of(config)
    order = [7, 0, 19, 3, 3, 18]  # as after resumes
    assert rates_of(config, order) == [in_order[i] for i in order]


def test_a_checkpoint_does_not_bring_the_rate_of_the_run_that_wrote_it():
    optimizer = StandInOptimizer()
    schedule = LearningRateSchedule(optimizer, OptimConfig(lr=1e-3, decay_style="linear"), ITERS)
    expected = schedule.set_iteration(5)
    for group in optimizer.param_groups:
        group.update(max_lr=7.0, min_lr=6.0, lr=6.5)  # as Megatron stores them
    assert schedule.set_iteration(5) == expected


def test_weight_decay_stays_and_spares_the_groups_that_have_none():
    optimizer = StandInOptimizer()
    schedule = LearningRateSchedule(optimizer, OptimConfig(weight_decay=0.3), ITERS)
    for iteration in (0, 5, 19):
        schedule.set_iteration(iteration)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
