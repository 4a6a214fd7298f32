"""What transformers computes for a model folder, one unpadded sequence at a time; for the parent process of the tests.

Ranks read the results from files, so they need no transformers.

Shapes: T = rows, V = vocabulary entries, H = hidden size.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_hf_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model in evaluation mode. transformers computes norms and rotary angles in fp32 whatever the type."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    found = model.model.rotary_emb.inv_freq.tolist()
    expected = _rotary_frequencies(model.config.rope_parameters, len(found))
    assert all(abs(a / b - 1) < 1e-5 for a, b in zip(found, expected, strict=True)), (
        f"transformers left the rotary frequencies uninitialised: {found}"
    )
    return model


def _rotary_frequencies(rope: dict[str, Any], num: int) -> list[float]:
    """Frequency by frequency, as the model cards of Llama 3.1 describe it."""
    plain = [rope["rope_theta"] ** -(i / num) for i in range(num)]
    if rope["rope_type"] == "default":
        return plain
    scaled = []
    for frequency in plain:
        wave_length = 2 * math.pi / frequency
        num_waves = rope["original_max_position_embeddings"] / wave_length
        if num_waves > rope["high_freq_factor"]:
            scaled.append(frequency)
        elif num_waves < rope["low_freq_factor"]:
            scaled.append(frequency / rope["factor"])
        else:
            share = (num_waves - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            scaled.append((1 - share) * frequency / rope["factor"] + share * frequency)
    return scaled


@torch.no_grad()
def hidden_rows(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, H] states after the final norm of every position."""
    return model.model(torch.tensor([list(ids)])).last_hidden_state[0]


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, V] logits of every position."""
    return model(torch.tensor([list(ids)])).logits[0]


def greedy(
    model: Any, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]
) -> tuple[list[int], float]:
    """(completion through the first stop token, smallest distance between the two best logits on the way)."""
    ids, margin = list(prompt), float("inf")
    for _ in range(max_new_tokens):
        best = logits(model, ids)[-1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :], margin
