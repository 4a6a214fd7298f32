"""SGLang servers: HTTP clients and process management."""

from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.command import ServerSettings
from megatron_gkd.serving.errors import (
    EngineDied,
    EngineError,
    EngineReplyInvalid,
    EngineRequestInvalid,
    EngineTimeout,
    StaleWeights,
)
from megatron_gkd.serving.process import ServerProcess
from megatron_gkd.serving.protocol import Completion, Sampling
from megatron_gkd.serving.teacher_client import TeacherClient
from megatron_gkd.serving.top_k import TopKLogProbs

__all__ = [
    "Completion",
    "EngineDied",
    "EngineError",
    "EngineReplyInvalid",
    "EngineRequestInvalid",
    "EngineTimeout",
    "Sampling",
    "ServerProcess",
    "ServerSettings",
    "SglangClient",
    "StaleWeights",
    "TeacherClient",
    "TopKLogProbs",
]
