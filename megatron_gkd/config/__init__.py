"""Typed configuration: YAML files and overrides in, one frozen tree out; imports no torch."""

from megatron_gkd.config.data import DataConfig, EvaluationConfig
from megatron_gkd.config.errors import ConfigError
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.config.load import load_config
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.config.model import ModelConfig, ParallelConfig
from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.config.rollout import MegatronRolloutConfig, RolloutConfig, SglangRolloutConfig
from megatron_gkd.config.runtime import RuntimeConfig
from megatron_gkd.config.schema import (
    CheckpointConfig,
    GkdConfig,
    GkdSection,
    LoggingConfig,
    RecomputeConfig,
    StudentConfig,
    StudentParallelConfig,
    TrainConfig,
)
from megatron_gkd.config.teacher import (
    MegatronTeacherConfig,
    NoTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GkdConfig",
    "GkdSection",
    "HfShapes",
    "LoggingConfig",
    "LossConfig",
    "MegatronRolloutConfig",
    "MegatronTeacherConfig",
    "ModelConfig",
    "NoTeacherConfig",
    "OptimConfig",
    "ParallelConfig",
    "RecomputeConfig",
    "RolloutConfig",
    "RuntimeConfig",
    "ServerTeacherConfig",
    "SglangRolloutConfig",
    "StudentConfig",
    "StudentParallelConfig",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
    "load_hf_shapes",
]
