"""Learning rate of an iteration: a function of its number alone, so a resumed run needs no stored schedule."""

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_gkd.config.optim import OptimConfig

_MEGATRON_STYLES = {"inverse_square_root": "inverse-square-root", "wsd": "WSD"}


class LearningRateSchedule:
    """Linear warm-up, then one of the decays of ``optim.decay_style`` to ``min_lr``, by Megatron's scheduler.

    The first of the warm-up's iterations runs at ``lr / warmup``; the decay would reach ``min_lr`` one iteration
    after the last, so no iteration is spent at a rate of zero.
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
        """Set the rate of the iteration with this index (from 0) in the optimizer and return it."""
        for group in self._optimizer.param_groups:
            # Megatron reads these first, and a checkpoint brings those of the run that wrote it
            group["max_lr"], group["min_lr"] = self._config.lr, self._config.min_lr
        self._scheduler.num_steps = 0
        self._scheduler.step(iteration + 1)
        return self._optimizer.param_groups[0]["lr"]
