"""Learning rate of an iteration: a function of its number alone, so a resumed run needs no stored schedule."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gkd.config.schema import OptimConfig


class LearningRateSchedule:
    """Linear warm-up, then constant, linear or cosine decay to ``min_lr``, by Megatron's scheduler.

    The first of ``warmup_iters`` iterations runs at ``lr / warmup_iters``; the decay would reach ``min_lr`` one iteration
    after the last, so no iteration is spent at a rate of zero.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: OptimConfig, train_iters: int):
        self._optimizer = optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_iters,
            lr_decay_steps=max(train_iters, config.warmup_iters) + 1,
            lr_decay_style=config.decay_style,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=train_iters,
            wd_incr_style="constant",
        )

    def set_iteration(self, iteration: int) -> float:
        """Set the rate of the iteration with this index (from 0) in the optimizer and return it."""
        self._scheduler.num_steps = 0
        self._scheduler.step(iteration + 1)
        return self._optimizer.param_groups[0]["lr"]
