"""From the teacher section to a client of its server, and to the teacher behind it."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.config import ConfigError, GkdConfig
from megatron_gkd.config.hf_shapes import load_hf_shapes, load_served_model
from megatron_gkd.config.teacher import ServerTeacherConfig
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.serving.connection import read_api_key
from megatron_gkd.serving.teacher_client import TeacherClient
from megatron_gkd.teacher.server import ServerTeacher

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
    log.info(
        "Teacher: %s at %s, top %d; checked against %s",
        teacher.served_folder,
        section.url,
        section.top_k,
        section.hf_folder,
    )
    return teacher


def require_same_model(section: ServerTeacherConfig, served: Path) -> None:
    """Refuse a server that runs from a folder with a model of other sizes than ``teacher.hf`` has.

    Weights are not compared: where the folders have different names, or the served one is not seen here, a warning says so.

    Args:
        section: The teacher section.
        served: Folder that the server says it runs from; a path of its machine.

    Raises:
        ConfigError: Names the server, both folders and the sizes that differ.
    """
    is_seen = os.access(served / "config.json", os.R_OK)
    if is_seen:
        _require_same_sizes(section, served)
    if served.name not in (section.hf.name, section.hf.resolve().name):
        log.warning(
            "The teacher's server at %s runs from %s, and teacher.hf is %s; %s. Make sure that it is the same model",
            section.url,
            served,
            section.hf,
            "their sizes are equal" if is_seen else "its files are not seen from here",
        )


def _require_same_sizes(section: ServerTeacherConfig, served: Path) -> None:
    expected, found = load_served_model(section.hf_folder).sizes, load_served_model(served).sizes
    different = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if different:
        raise ConfigError(
            f"{server_keys(section)}: it runs from {served} with {_values(found, different)}, but teacher.hf="
            f"{str(section.hf)!r} has {_values(expected, different)}; start it with launch/serve.py --model {section.hf}, or "
            "let teacher.hf be what it serves"
        )


def _values(sizes: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={sizes.get(key)}" for key in keys)


def server_keys(section: ServerTeacherConfig) -> str:
    """The keys that say where the server is, with their values, as messages begin."""
    return f"teacher.server_ip={section.server_ip!r}, teacher.server_port={section.server_port}"


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
