"""Typed configuration: YAML files and overrides in, one frozen tree out; imports no torch."""

from megatron_gkd.config.errors import ConfigError
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.config.load import load_config
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.config.rollout import MegatronRolloutConfig, RolloutConfig, SglangRolloutConfig
from megatron_gkd.config.schema import (
    CheckpointConfig,
    DataConfig,
    GkdConfig,
    GkdSection,
    LoggingConfig,
    MegatronTeacherConfig,
    NoTeacherConfig,
    OptimConfig,
    ParallelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "GkdConfig",
    "GkdSection",
    "HfShapes",
    "LoggingConfig",
    "LossConfig",
    "MegatronRolloutConfig",
    "MegatronTeacherConfig",
    "NoTeacherConfig",
    "OptimConfig",
    "ParallelConfig",
    "RolloutConfig",
    "SglangRolloutConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
    "load_hf_shapes",
]
