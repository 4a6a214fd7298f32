"""What this machine must offer before a run starts; found here, where no process waits for another yet.

What can be told from the configuration and the files alone is in ``config.check``, so that ``--check`` tells it too.
"""

from pathlib import Path

import torch

from megatron_gkd.config import ConfigError, GkdConfig
from megatron_gkd.config.hf_shapes import load_served_model
from megatron_gkd.config.teacher import ServerTeacherConfig
from megatron_gkd.data.tokenizer import Tokenizer, load_tokenizer, require_same_vocabulary
from megatron_gkd.serving.errors import EngineError
from megatron_gkd.train.served_teacher import make_teacher_client, require_same_model, server_keys

CHECK_TIMEOUT_S = 30.0


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
