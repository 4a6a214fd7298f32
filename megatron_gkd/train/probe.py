"""The trainer's own log-probabilities of a few sequences, to compare with the generation engine's.

Shapes: B = sequences, S = positions, T = rows, H = hidden size.
"""

from collections.abc import Sequence

import torch

from megatron_gkd.data.sample import MicroBatch
from megatron_gkd.losses import linear_cross_entropy
from megatron_gkd.models.gpt import head_weight
from megatron_gkd.models.pipeline import evaluation_mode, forward_rows
from megatron_gkd.parallel.collectives import broadcast_json
from megatron_gkd.train.build import Student

MAX_SEQUENCES, MAX_TOKENS = 2, 48


def probe_sequences(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """A few sequences, cut to their last tokens so that they cost little; each at least two tokens long.

    Where all have a single token, it stands twice.
    """
    longer = [list(ids[-MAX_TOKENS:]) for ids in sequences if len(ids) > 1]
    return longer[:MAX_SEQUENCES] or [[*ids, *ids] for ids in sequences if ids][:MAX_SEQUENCES]


def trainer_log_probs(student: Student, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability in nats of every token after the first, at temperature 1; collective, equal on all ranks."""
    rows_per_sequence = [len(ids) - 1 for ids in sequences]
    micro_batch = _as_micro_batch(sequences, student.groups.layout.tp_size)
    with evaluation_mode(student.model):
        rows = forward_rows(student.model, student.model.config, student.groups, [micro_batch])
    values: list[float] = []
    if rows:
        labels_T = torch.tensor([i for ids in sequences for i in ids[1:]], device=rows[0].device)
        with torch.no_grad():
            loss_T = linear_cross_entropy(
                rows[0],
                head_weight(student.model),
                labels_T,
                group=student.groups.pg.tp,
                valid_vocab_size=student.shapes.vocab_size,
            )
        assert isinstance(loss_T, torch.Tensor)  # as always without token_weight_T
        values = (-loss_T).tolist()
    layout = student.groups.layout
    owner = layout.rank_at(tp_rank=0, dp_rank=0, pp_rank=layout.pp_size - 1)
    device = next(student.model.parameters()).device
    values = broadcast_json(values, device=device, src=owner)
    return _cut(values, rows_per_sequence)


def _cut(values: Sequence[float], sizes: Sequence[int]) -> list[list[float]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return parts


def _as_micro_batch(sequences: Sequence[Sequence[int]], multiple_of: int) -> MicroBatch:
    longest = max(map(len, sequences))
    length = -(-longest // multiple_of) * multiple_of
    tokens_BS = torch.zeros(len(sequences), length, dtype=torch.long)
    mask_BS = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
        mask_BS[row, : len(ids) - 1] = True
    position_ids_BS = torch.arange(length).expand_as(tokens_BS).contiguous()
    return MicroBatch(tokens_BS, position_ids_BS, mask_BS, tuple(range(len(sequences))))
