"""What must not be sent: requests that would kill the server, or spoil the result without a word."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_gkd.serving.errors import EngineRequestInvalid


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises ``EngineRequestInvalid`` for an empty prompt or an id outside [0, vocab_size): both kill sglang 0.5.23."""
    for index, ids in enumerate(prompts):
        if len(ids) == 0:
            raise EngineRequestInvalid(f"prompt {index} is empty; it would kill the server")
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise EngineRequestInvalid(
                    f"prompt {index} has token {token!r} outside [0, {vocab_size}); it would kill the server"
                )


def check_seeds(seeds: Sequence[int], num_prompts: int) -> None:
    """Raises ``EngineRequestInvalid`` unless there is one seed in [0, 2**63) per prompt and all differ."""
    if len(seeds) != num_prompts:
        raise EngineRequestInvalid(f"{num_prompts} prompts need as many seeds, not {len(seeds)}")
    if bad := [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**63]:
        raise EngineRequestInvalid(f"seed {bad[0]!r} is not an integer in [0, 2**63)")
    if len(set(seeds)) != len(seeds):
        raise EngineRequestInvalid("seeds repeat; two samples of one prompt would be identical")


def check_weight_files(folder: Path) -> None:
    """Raises ``EngineRequestInvalid`` unless ``folder`` holds safetensors files with headers that fit their sizes.

    sglang 0.5.23 does not refuse a damaged or truncated file: its scheduler crashes on it, and so it does on a tensor of
    another shape. Unknown names, missing tensors and another number format it accepts silently; that is for the pusher
    to exclude. Only headers are read here.
    """
    if not folder.is_dir():
        raise EngineRequestInvalid(f"weight folder {folder} does not exist")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineRequestInvalid(f"weight folder {folder} holds no *.safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                is_empty = not list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise EngineRequestInvalid(f"{file} would kill the server: {error}") from error
        if is_empty:
            raise EngineRequestInvalid(f"{file} holds no tensor")
