"""Learning-rate schedule as a function of the iteration; checkpoints need no schedule state."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gkd.config.optim import OptimConfig

_MEGATRON_STYLES = {"inverse_square_root": "inverse-square-root", "wsd": "WSD"}


class LearningRateSchedule:
    """Linear warmup, then decay to ``min_lr`` by ``optim.decay_style``, with Megatron's scheduler.

    The first warmup iteration runs at ``lr / warmup``, and ``min_lr`` would be reached one iteration after the last, so
    no iteration has a rate of zero.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: OptimConfig, train_iters: int):
        self._optimizer, self._config = optimizer, config
        warmup = config.num_warmup_iters(train_iters)
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=max(train_iters, warmup) + 1,
            lr_decay_style=_MEGATRON_STYLES.get(config.decay_style, config.decay_style),
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=train_iters,
            wd_incr_style="constant",
            wsd_decay_steps=config.num_wsd_decay_iters(train_iters) + 1,
            lr_wsd_decay_style=config.wsd_decay_style,
        )

    def set_iteration(self, iteration: int) -> float:
        """Set the learning rate for the 0-based ``iteration`` and return it."""
        for group in self._optimizer.param_groups:
            # Megatron's scheduler prefers these entries of the group, and a loaded checkpoint has overwritten them
            # with the values of the run that saved it (optimizer_param_scheduler.py:223, 0.16.1)
            group["max_lr"], group["min_lr"] = self._config.lr, self._config.min_lr
        self._scheduler.num_steps = 0  # step() adds its argument to the count
        self._scheduler.step(iteration + 1)
        return self._optimizer.param_groups[0]["lr"]
