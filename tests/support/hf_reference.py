"""What transformers computes for a model folder, one unpadded sequence at a time; for the parent process of the tests.

Ranks read the results from files, so they need no transformers.

Shapes: T = rows, V = vocabulary entries, H = hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_hf_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model in evaluation mode. transformers computes norms and rotary angles in fp32 whatever the type."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    inverse = model.model.rotary_emb.inv_freq
    expected = 10000.0 ** -(torch.arange(len(inverse)) / len(inverse))
    assert torch.allclose(inverse.float(), expected), "transformers left the rotary frequencies uninitialised"
    return model


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
