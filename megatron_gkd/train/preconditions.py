"""What this machine must offer before a run starts; found here, where no process waits for another yet.

What can be told from the configuration and the files alone is in ``config.check``, so that ``--check`` tells it too.
"""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_gkd.config import ConfigError, GkdConfig
from megatron_gkd.config.hf_shapes import load_hf_shapes, load_served_model
from megatron_gkd.config.rollout import SglangRolloutConfig
from megatron_gkd.config.teacher import ServerTeacherConfig
from megatron_gkd.data.tokenizer import Tokenizer, load_tokenizer, require_same_vocabulary
from megatron_gkd.parallel.groups import Layout
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.command import check_cpu_plugin
from megatron_gkd.serving.errors import EngineError
from megatron_gkd.train.build import DTYPES
from megatron_gkd.train.engines import api_key_of, push_base
from megatron_gkd.train.served_teacher import make_teacher_client, require_same_model, server_keys

GIB = 2**30
CHECK_TIMEOUT_S = 30.0
PUSH_COPIES = 2  # the new weights are written while the server may still read the last ones


def require_engine(config: GkdConfig, device: torch.device, *, is_leader: bool) -> None:
    """Refuse a run whose generation engine could not work here.

    Args:
        config: Checked configuration.
        device: Of this rank.
        is_leader: Whether this is rank 0, which alone talks to servers.

    Raises:
        ConfigError: Lists all problems.
    """
    rollout = config.rollout
    if not isinstance(rollout, SglangRolloutConfig):
        return
    problems = list(_push_problems(config, rollout))
    if rollout.placement == "colocated":
        problems += _package_problems(device)
    elif is_leader:
        problems += _server_problems(config, rollout)
    if problems:
        raise ConfigError.listing("what the run needs on this machine", problems)


def require_teacher(config: GkdConfig, tokenizer: Tokenizer) -> None:
    """Refuse a run whose teacher is a server that does not answer, or serves something else than ``teacher.hf`` says.

    Every rank asks, so that none waits for one that was refused.

    Args:
        config: Checked configuration.
        tokenizer: The student's.

    Raises:
        ConfigError: Names the server and what is wrong with it.
        DataError: The server runs from a folder that is seen here too and holds another tokenizer.
    """
    teacher = config.teacher
    if not isinstance(teacher, ServerTeacherConfig):
        return
    hurried = {"request_timeout_s": min(teacher.request_timeout_s, CHECK_TIMEOUT_S), "max_retries": 0}
    client = make_teacher_client(teacher.model_copy(update=hurried))
    try:
        served = client.check_model(
            model_type=load_served_model(teacher.hf_folder).model_type,
            num_sequence_tokens=config.teacher_seq_length,
        )
    except EngineError as error:
        raise ConfigError(
            f"{server_keys(teacher)}: {error}; start the server with launch/serve.py, and let "
            f"teacher.hf={str(teacher.hf)!r} be what it serves"
        ) from error
    require_same_model(teacher, Path(served))
    if (Path(served) / "tokenizer_config.json").is_file():
        require_same_vocabulary(tokenizer, load_tokenizer(served))


def require_loss_backend(config: GkdConfig, device: torch.device) -> None:
    """Refuse a loss that this device cannot compute.

    Raises:
        ConfigError: Names the key.
    """
    if config.loss.backend == "triton" and device.type == "cpu":
        raise ConfigError(
            "loss.backend=triton needs a GPU, and no CUDA device is visible; set loss.backend=auto"
        )


def _package_problems(device: torch.device) -> Iterator[str]:
    if find_spec("sglang") is None:
        yield (
            "rollout.kind=sglang starts an SGLang server, and the package sglang is not installed here; install it "
            "(see README) or set rollout.kind=megatron"
        )
    elif device.type == "cpu":
        try:
            check_cpu_plugin()
        except RuntimeError as error:
            yield f"rollout.kind=sglang: {error}, or set rollout.kind=megatron"


def _push_problems(config: GkdConfig, rollout: SglangRolloutConfig) -> Iterator[str]:
    folder = push_base(config, rollout)
    if rollout.push_dir is None and folder == config.train.output_dir:
        return  # made by the run; its space is checked with the checkpoints'
    name = f"rollout.push_dir={str(folder)!r}" + ("" if rollout.push_dir else " (the default)")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield f"{name} is no folder that can be written; name one that the server sees too"
        return
    yield from _push_space_problems(config, folder, name)
    if rollout.push_dir is None and not _is_on_one_machine(config):
        yield (
            f"{name} is memory of one machine, and the student's ranks, which write there, are on several "
            "(student.parallel); name a folder on a file system that all of them share"
        )


def _is_on_one_machine(config: GkdConfig) -> bool:
    """Whether the ranks of the first copy of the student, the one that is pushed, run where rank 0 does."""
    parallel, world_size = config.student.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout(
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, num_ranks=world_size
    )
    last_rank = max(layout.last_stage_ranks(dp_rank=0))
    return last_rank < int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _push_space_problems(config: GkdConfig, folder: Path, name: str) -> Iterator[str]:
    parameters = load_hf_shapes(config.student.hf_folder).num_parameters
    needed = PUSH_COPIES * parameters * DTYPES[config.train.precision].itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield (
            f"{name} has {free / GIB:.2f} GiB free and {PUSH_COPIES} copies of the student's weights take "
            f"{needed / GIB:.2f} GiB; name a larger folder (containers: raise the size of /dev/shm)"
        )


def _server_problems(config: GkdConfig, rollout: SglangRolloutConfig) -> Iterator[str]:
    vocab_size, api_key = load_hf_shapes(config.student.hf_folder).vocab_size, api_key_of(rollout)
    for url in rollout.urls:
        try:
            client = SglangClient(
                url,
                vocab_size=vocab_size,
                request_timeout_s=min(rollout.request_timeout_s, CHECK_TIMEOUT_S),
                max_retries=0,
                api_key=api_key,
            )
            client.check_settings(num_sequence_tokens=config.seq_length)
        except (EngineError, ValueError) as error:
            yield f"rollout.urls: {url}: {error}"
