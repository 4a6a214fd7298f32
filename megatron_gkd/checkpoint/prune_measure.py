"""Calibration text for pruning, and what a model with other layers does to it.

Shapes: B = rows, S = positions, N = real (not padded) positions of all rows, T = completion tokens,
H = hidden, F = FFN channels, V = vocabulary entries.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

log = logging.getLogger(__name__)

ROWS_PER_FORWARD = 8
TOKENS_PER_CHUNK = 256


class CalibrationRow(NamedTuple):
    """Text that the model wrote: all its tokens, and how many of them are the prompt's."""

    ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Text:
    """Calibration rows as right-padded batches; causal attention never sees the padding."""

    batches: tuple[Tensor, ...]
    is_real: tuple[Tensor, ...]
    is_scored: tuple[Tensor, ...]
    """Positions that predict a completion token."""

    @classmethod
    def of(cls, rows: Sequence[CalibrationRow]) -> "Text":
        """Sorted by length, so that little is padding."""
        ordered = sorted(rows, key=lambda row: len(row.ids))
        parts = [
            ordered[start : start + ROWS_PER_FORWARD] for start in range(0, len(ordered), ROWS_PER_FORWARD)
        ]
        batches = tuple(
            pad_sequence([torch.tensor(row.ids) for row in part], batch_first=True) for part in parts
        )
        real, scored = [], []
        for part, batch in zip(parts, batches, strict=True):
            position_1S = torch.arange(batch.shape[1]).unsqueeze(0)
            length_B1 = torch.tensor([[len(row.ids)] for row in part])
            prompt_B1 = torch.tensor([[row.prompt_length] for row in part])
            real.append(position_1S < length_B1)
            scored.append((position_1S >= prompt_B1 - 1) & (position_1S < length_B1 - 1))
        return cls(batches, tuple(real), tuple(scored))

    @property
    def num_tokens(self) -> int:
        """Real positions of all rows, prompts included."""
        return int(sum(mask.sum() for mask in self.is_real))

    def pack(self, values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """[N or T, ...] values at the marked positions of all batches."""
        return torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)])


def measure_blocks(teacher: Any, text: Text, num_dropped: int) -> dict[int, float]:
    """KL(teacher || teacher without layers [first, first + num_dropped)) for every place of the block."""
    if num_dropped == 0:
        return {}
    layers = list(teacher.base_model.layers)
    inputs = [[teacher.get_input_embeddings()(batch) for batch in text.batches]]
    for layer in layers:
        inputs.append([run_layer(teacher, layer, hidden)[1] for hidden in inputs[-1]])
    target_TH = text.pack([run_layers(teacher, [], hidden) for hidden in inputs[-1]], text.is_scored)
    head_VH = teacher.get_output_embeddings().weight
    tried = {}
    for first in range(len(layers) - num_dropped + 1):
        rest = layers[first + num_dropped :]
        hidden_TH = text.pack([run_layers(teacher, rest, hidden) for hidden in inputs[first]], text.is_scored)
        tried[first] = kl(target_TH, head_VH, hidden_TH, head_VH)
        log.info("Without layers %d to %d: KL %.3f nats/token", first, first + num_dropped - 1, tried[first])
    return tried


def mean_kl(teacher: Any, student: Any, text: Text) -> float:
    """KL(teacher || student), mean over the completion tokens, in nats."""

    def final(model: Any) -> tuple[Tensor, Tensor]:
        hidden = [model.base_model(batch, use_cache=False).last_hidden_state for batch in text.batches]
        return text.pack(hidden, text.is_scored), model.get_output_embeddings().weight

    return kl(*final(teacher), *final(student))


def kl(teacher_TH: Tensor, teacher_head_VH: Tensor, student_TH: Tensor, student_head_VH: Tensor) -> float:
    """KL(teacher || student), mean over tokens in nats; the logits exist in chunks only."""
    total = 0.0
    for start in range(0, teacher_TH.shape[0], TOKENS_PER_CHUNK):
        chunk = slice(start, start + TOKENS_PER_CHUNK)
        log_p_TV = (teacher_TH[chunk] @ teacher_head_VH.T).log_softmax(-1)
        log_q_TV = (student_TH[chunk] @ student_head_VH.T).log_softmax(-1)
        total += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).double().sum().item()
    return total / teacher_TH.shape[0]


@contextmanager
def other_layers(model: Any, layers: Sequence[Any]) -> Iterator[None]:
    """The model with other layers, so that masks and rotary embeddings stay its own business."""
    whole = model.base_model.layers
    model.base_model.layers = nn.ModuleList(layers)
    try:
        yield
    finally:
        model.base_model.layers = whole


def run_layers(model: Any, layers: Sequence[Any], hidden_BSH: Tensor) -> Tensor:
    """[B, S, H] after these layers and the final norm."""
    with other_layers(model, layers):
        return model.base_model(inputs_embeds=hidden_BSH, use_cache=False).last_hidden_state


def run_layer(model: Any, layer: Any, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """FFN activations [B, S, F] (what the down projection reads) and output [B, S, H] of one layer."""
    seen: list[Tensor] = []

    def keep_input(_module, args):
        seen.append(args[0])

    def keep_output(_module, _args, output):
        seen.append(output if isinstance(output, Tensor) else output[0])

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(keep_input),
        layer.register_forward_hook(keep_output),
    ]
    try:
        run_layers(model, [layer], hidden_BSH)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0], seen[1]
