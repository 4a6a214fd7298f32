"""From the teacher section to a client of its server, and to the teacher behind it."""

import logging

import torch

from megatron_gkd.config import GkdConfig
from megatron_gkd.config.hf_shapes import load_hf_shapes, load_served_model
from megatron_gkd.config.teacher import ServerTeacherConfig
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.serving.teacher import TeacherClient
from megatron_gkd.teacher.server import ServerTeacher
from megatron_gkd.train.api_keys import read_api_key

log = logging.getLogger(__name__)


def build_served_teacher(
    config: GkdConfig, section: ServerTeacherConfig, groups: ModelGroups, device: torch.device
) -> ServerTeacher:
    """The teacher behind a port, after a look at what it serves. Collective.

    Args:
        config: Checked configuration.
        section: Its teacher section.
        groups: The student's.
        device: The device of this rank.

    Raises:
        EngineError: See ``ServerTeacher``.
    """
    teacher = ServerTeacher(
        make_teacher_client(section),
        model_type=load_served_model(section.hf_folder).model_type,
        num_sequence_tokens=config.teacher_seq_length,
        vocab_size=load_hf_shapes(config.student.hf_folder).vocab_size,
        groups=groups,
        device=device,
    )
    log.info("Teacher: %s at %s, top %d", section.hf_folder, section.url, section.top_k)
    return teacher


def make_teacher_client(section: ServerTeacherConfig) -> TeacherClient:
    """A client of the teacher's server; sends nothing yet.

    Raises:
        ConfigError: The variable that should hold the API key is not set.
    """
    return TeacherClient(
        section.url,
        vocab_size=load_served_model(section.hf_folder).vocab_size,
        top_k=section.top_k,
        requests_in_flight=section.requests_in_flight,
        request_timeout_s=section.request_timeout_s,
        max_retries=section.max_retries,
        api_key=read_api_key("teacher.api_key_env", section.api_key_env),
    )
