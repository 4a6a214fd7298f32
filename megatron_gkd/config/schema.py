"""The configuration tree and the values derived from several sections.

A key is declared in its section only: type, limits, default and docstring. The docstrings become the comments of
``configs/on_policy_distill_trainer.yaml`` and the tables of ``docs/configuration.md``.
"""

import math
from pathlib import Path

import yaml

from megatron_gkd.config.base import Config, ConfigError, Free
from megatron_gkd.config.checkpoint import CheckpointConfig
from megatron_gkd.config.data import DataConfig
from megatron_gkd.config.evaluation import EvaluationConfig
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.config.model import ModelConfig
from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.config.rollout import RolloutConfig, SglangRolloutConfig
from megatron_gkd.config.runtime import LoggingConfig, RuntimeConfig
from megatron_gkd.config.student import StudentConfig
from megatron_gkd.config.teacher import TeacherConfig
from megatron_gkd.config.train import GkdSection, TrainConfig


class GkdConfig(Config):
    """The whole configuration of a run."""

    student: StudentConfig
    teacher: TeacherConfig
    rollout: RolloutConfig = SglangRolloutConfig()
    gkd: GkdSection = GkdSection()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    evaluation: Free[EvaluationConfig] = EvaluationConfig()
    checkpoint: Free[CheckpointConfig] = CheckpointConfig()
    logging: Free[LoggingConfig] = LoggingConfig()
    runtime: Free[RuntimeConfig] = RuntimeConfig()

    @property
    def seq_length(self) -> int:
        """Longest sequence in tokens: prompt and completion."""
        return self.data.max_prompt_length + self.rollout.max_new_tokens

    @property
    def teacher_seq_length(self) -> int:
        """Longest sequence that the teacher scores, in tokens; its prompts may be longer."""
        return self.data.teacher_prompt_length + self.rollout.max_new_tokens

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.train.output_dir / "checkpoints"

    def with_iterations(self, num_prompts: int | None) -> "GkdConfig":
        """A copy with ``train.train_iters`` in place of ``train.epochs``; self if that is not set.

        Args:
            num_prompts: Usable prompts per pass; ``None`` if unknown.

        Raises:
            ConfigError: The number of prompts is unknown, or the schedule does not fit into the run.
        """
        if not self.train.epochs:
            return self
        if num_prompts is None:
            raise ConfigError(
                f"train.epochs={self.train.epochs} needs the number of prompts, which is unknown for streamed or weighted data; "
                "set train.train_iters instead"
            )
        prompts_per_iter = self.train.global_batch_size // self.rollout.num_samples
        # 0.1 * 30 is 3.0000000000000004, which ceil would turn into another iteration
        train_iters = math.ceil(round(self.train.epochs * num_prompts, 6) / prompts_per_iter)
        if problems := list(self.optim.schedule_problems(train_iters)):
            raise ConfigError.listing(f"train.epochs={self.train.epochs} of {num_prompts} prompts", problems)
        train = self.train.model_copy(update={"train_iters": train_iters, "epochs": 0.0})
        return self.model_copy(update={"train": train})

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that run on the ranks of the job, by section."""
        if not self.teacher.on_ranks:
            return {"student": self.student}
        assert isinstance(self.teacher, ModelConfig)
        return {"student": self.student, "teacher": self.teacher}

    def to_yaml(self) -> str:
        """The complete tree with all defaults; ``load_config`` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
