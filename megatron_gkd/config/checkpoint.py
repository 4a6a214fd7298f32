"""The checkpoint section: saving, retention and resuming."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.base import Config


class CheckpointConfig(Config):
    """Saving and resuming."""

    save_interval: int = Field(default=0, ge=0)
    """Iterations between checkpoints; 0: only at the end."""
    async_save: bool = False
    """Write checkpoints while training goes on. It waits only until the tensors are copied to host memory, which needs
    room for them; on a CPU the copies are made as training changes the originals."""
    keep_last: int = Field(default=0, ge=0)
    """Newest checkpoints that are kept, older ones are removed; 0 keeps all. The disk needs room for one more."""
    keep_best_metric: Literal["loss", "validation/loss"] | None = None
    """Also keep the checkpoint at which this metric was lowest, and link it as checkpoints/best. validation/loss is then
    measured before every save of checkpoint.save_interval, too."""
    resume: bool = True
    """Continue from the newest valid checkpoint under train.output_dir, if there is one. Checkpoints of later iterations,
    or all with false, are moved to checkpoints/superseded."""
    allow_changes: tuple[str, ...] = ()
    """Keys or sections, such as optim.lr or loss, that may differ from the configuration of the checkpoint that is
    resumed; any other change of what is computed is refused. Changed data are read from their beginning."""
