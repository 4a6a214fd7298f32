"""The learning rate of an iteration is the textbook one, whatever was asked before."""

import math

import pytest

from megatron_gkd.config.schema import OptimConfig
from megatron_gkd.optim.schedule import LearningRateSchedule

ITERS = 10


class StandInOptimizer:
    def __init__(self):
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.1, "wd_mult": 1.0}, {"lr": 0.0, "wd_mult": 0.0}]


def expected(config: OptimConfig, iteration: int) -> float:
    step, warmup = iteration + 1, config.warmup_iters
    if step <= warmup:
        return config.lr * step / warmup
    left = 1 - (step - warmup) / (ITERS + 1 - warmup)
    share = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[
        config.decay_style
    ]
    return config.min_lr + (config.lr - config.min_lr) * share


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_iters", [0, 1, 4, ITERS])
@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_every_iteration_has_its_rate_in_any_order(style: str, warmup_iters: int, min_lr: float):
    config = OptimConfig(lr=1e-3, min_lr=min_lr, decay_style=style, warmup_iters=warmup_iters)
    optimizer = StandInOptimizer()
    schedule = LearningRateSchedule(optimizer, config, ITERS)
    for iteration in [*range(ITERS), 7, 0, 3]:  # as after a resume
        rate = schedule.set_iteration(iteration)
        assert rate == pytest.approx(expected(config, iteration), rel=1e-9)
        assert rate > 0, "an iteration would be spent without an update"
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]


def test_weight_decay_stays_and_spares_the_groups_that_have_none():
    optimizer = StandInOptimizer()
    schedule = LearningRateSchedule(optimizer, OptimConfig(weight_decay=0.3), ITERS)
    for iteration in (0, 5, 9):
        schedule.set_iteration(iteration)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
