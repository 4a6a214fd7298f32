"""Typed configuration: YAML files and overrides in, one frozen tree out; imports no torch."""

from megatron_gkd.config.base import ConfigError
from megatron_gkd.config.check import check_config, check_world
from megatron_gkd.config.checkpoint import CheckpointConfig
from megatron_gkd.config.data import DataConfig
from megatron_gkd.config.evaluation import EvaluationConfig
from megatron_gkd.config.hf_shapes import HfShapes, load_hf_shapes
from megatron_gkd.config.load import load_config
from megatron_gkd.config.loss import LossConfig
from megatron_gkd.config.model import ModelConfig, ParallelConfig
from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.config.rollout import MegatronRolloutConfig, RolloutConfig, SglangRolloutConfig
from megatron_gkd.config.runtime import LoggingConfig, RuntimeConfig
from megatron_gkd.config.schema import GkdConfig
from megatron_gkd.config.student import LoraConfig, RecomputeConfig, StudentConfig, StudentParallelConfig
from megatron_gkd.config.teacher import (
    MegatronTeacherConfig,
    NoTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
)
from megatron_gkd.config.train import GkdSection, TrainConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GkdConfig",
    "GkdSection",
    "HfShapes",
    "LoggingConfig",
    "LoraConfig",
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
    "check_config",
    "check_world",
    "load_config",
    "load_hf_shapes",
]
