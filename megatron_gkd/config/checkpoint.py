"""The checkpoint section: saving, retention and resuming."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.base import Config


class CheckpointConfig(Config):
    """Saving and resuming."""

    save_interval: int = Field(default=0, ge=0)
    """Iterations between checkpoints; 0: only after the last."""
    async_save: bool = False
    """Write checkpoints in the background. Training waits only for the copy to host memory, which needs room for it; on a
    CPU pages are copied when training changes them."""
    keep_last: int = Field(default=0, ge=0)
    """Number of newest checkpoints to keep; older ones are removed. 0: all. The disk needs room for one more."""
    keep_best_metric: Literal["loss", "validation/loss"] | None = None
    """Also keep the checkpoint with the lowest value of this metric, linked as checkpoints/best. validation/loss is then
    also measured before every save of checkpoint.save_interval."""
    resume: bool = True
    """Continue from the newest valid checkpoint under train.output_dir, if there is one. Checkpoints of later iterations
    are moved to checkpoints/superseded; with false, all of them."""
    allow_changes: tuple[str, ...] = ()
    """Keys or sections, such as optim.lr or loss, that may differ from the resumed checkpoint's configuration; other
    changes of the computation are errors. Changed data are read from the start."""
