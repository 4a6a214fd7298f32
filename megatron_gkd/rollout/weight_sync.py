"""Push the student's weights into SGLang servers, and verify that they arrived.

Every rank writes its own slices into one memory-mapped safetensors file on tmpfs; nothing is gathered. SGLang answers
"success" even to a file without a whole layer, so its answer is no evidence. Before the request, the bytes written by all
ranks must add up to the file; after it, the server must report the new version and reproduce the trainer's
log-probabilities of a probe.

Shapes: B = sequences of the probe, S = positions, T = rows.
"""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.data.sample import MicroBatch
from megatron_gkd.losses import linear_cross_entropy
from megatron_gkd.models.gpt import ShardedModel, head_weight
from megatron_gkd.models.lora import merged_parameters
from megatron_gkd.models.pipeline import evaluation_mode, forward_rows
from megatron_gkd.parallel.collectives import any_rank, broadcast_json, reduce_values
from megatron_gkd.reshard.layout import (
    Slice,
    WeightLayout,
    all_owned_slices,
    check_coverage,
    hf_tensors,
    owned_slices,
)
from megatron_gkd.reshard.transport import MappedSafetensors
from megatron_gkd.rollout.base import PushReport
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.errors import EngineError

WEIGHT_FILE = "model.safetensors"
MAX_PROBE_SEQUENCES, MAX_PROBE_TOKENS = 2, 48


class WeightPushFailed(EngineError):
    """A server does not hold the student's weights; the message says how that was detected."""


class SharedWeightFile:
    """One safetensors file, filled by all ranks of one copy of the student, in two alternating folders.

    The server may still map the file of the previous push, so the next one goes to the other folder.

    Args:
        folder: On a file system that the ranks and the server share, preferably tmpfs.
        student: The student.
        parameters: This rank's weights by name; default: those of the student, adapters merged.

    Raises:
        ValueError: The slices of all ranks do not cover the model exactly once.
    """

    def __init__(self, folder: Path, student: ShardedModel, parameters: Mapping[str, Tensor] | None = None):
        groups, shapes = student.groups, student.shapes
        weights = WeightLayout(shapes, groups.layout, student.model.vocab_size)
        check_coverage(shapes, all_owned_slices(weights))
        self._folder, self._device = folder, next(student.model.parameters()).device
        self._parameters = merged_parameters(student.model) if parameters is None else parameters
        self._file = MappedSafetensors(hf_tensors(shapes), student.dtype)
        self._slices: list[Slice] = []
        if groups.dp_rank == 0:  # all copies are equal, one writes
            self._slices = owned_slices(
                weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=self._parameters
            )

    def write(self, version: int) -> tuple[Path, int]:
        """(folder, bytes) of the complete file; collective over all ranks.

        Raises:
            WeightPushFailed: On all ranks, if a rank does not see the file or not every byte was written.
        """
        folder = self._folder / f"slot_{version % 2}"
        file = folder / WEIGHT_FILE
        nonce = secrets.token_hex(8)
        error = None  # sent to all ranks instead of raised, or they would wait for rank 0
        if dist.get_rank() == 0:
            try:
                self._file.create(file)
                (folder / "nonce").write_text(nonce)
            except OSError as problem:
                error = f"cannot write the weights to {file}: {problem}; set rollout.push_dir to a folder with room"
        error, nonce = broadcast_json([error, nonce], device=self._device)
        if error:
            raise WeightPushFailed(error)
        # a file left behind by an earlier push would pass for the new one; the nonce of this push does not
        sees_file = not self._slices or _reads(folder / "nonce", nonce)
        if any_rank(not sees_file, device=self._device):
            raise WeightPushFailed(
                f"not every rank sees {folder}; set rollout.push_dir to a file system that all nodes share"
            )
        written = self._file.write(file, self._parameters, self._slices) if self._slices else 0
        total = int(reduce_values([float(written)], ["sum"], device=self._device)[0])
        if total != self._file.num_data_bytes:
            raise WeightPushFailed(
                f"push of version {version}: {total} of {self._file.num_data_bytes} bytes were written; "
                "the file was not handed to the server"
            )
        return folder, total


class WeightPusher:
    """Loads the student's weights into every server, and compares a probe.

    Args:
        student: The student.
        file: The file that the weights are handed over in.
        clients: One per server; used on rank 0 only.
        tolerance: Largest allowed difference in log-probability, in nats.
    """

    def __init__(
        self,
        student: ShardedModel,
        file: SharedWeightFile,
        clients: Sequence[SglangClient],
        tolerance: float,
    ):
        self._student, self._file, self._clients, self._tolerance = student, file, clients, tolerance
        self._device = next(student.model.parameters()).device

    def push(self, version: int, probe: Sequence[Sequence[int]]) -> PushReport:
        """Load the current weights into all servers as ``version``; collective over all ranks.

        Args:
            version: Finished iterations.
            probe: Token ids; the last tokens of the first sequences are scored, see ``probe_sequences``.

        Raises:
            WeightPushFailed: On all ranks; the servers must not be used afterwards.
        """
        folder, num_bytes = self._file.write(version)
        # the probe is scored with the weights as pushed: no update happens before the server has answered
        sequences = probe_sequences(probe)
        expected = trainer_log_probs(self._student, sequences)
        outcome = (
            self._load_and_compare(folder, version, sequences, expected) if dist.get_rank() == 0 else None
        )
        error, difference = broadcast_json(outcome, device=self._device)
        if error:
            raise WeightPushFailed(error)
        return PushReport(num_bytes, difference, sum(map(len, expected)))

    def _load_and_compare(self, folder: Path, version: int, sequences, expected) -> tuple[str | None, float]:
        """(error, largest difference) over all servers."""
        worst = 0.0
        try:
            for client in self._clients:
                client.update_weights_from_disk(folder, version)
                worst = _larger(worst, _largest_difference(client.score(sequences), expected))
        except Exception as error:  # of any kind: the other ranks already wait for the outcome
            return f"push of version {version}: {type(error).__name__}: {error}", worst
        if not worst <= self._tolerance:  # true for NaN as well
            return (
                f"push of version {version}: after it a log-probability of the server differs from the trainer's by "
                f"{worst:.3g} nats, more than rollout.probe_tolerance={self._tolerance:g}; the server does not have the "
                "student's weights, or computes in another precision"
            ), worst
        return None, worst


def probe_sequences(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first sequences of at least two tokens, cut to their last tokens to limit the cost.

    If all sequences have a single token, it is repeated.
    """
    longer = [list(ids[-MAX_PROBE_TOKENS:]) for ids in sequences if len(ids) > 1]
    return longer[:MAX_PROBE_SEQUENCES] or [[*ids, *ids] for ids in sequences if ids][:MAX_PROBE_SEQUENCES]


def trainer_log_probs(student: ShardedModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability in nats of every token after the first, at temperature 1; collective, equal on all ranks."""
    groups, model = student.groups, student.model
    # a multiple of the tensor-parallel size, in case of sequence parallelism
    micro_batch = _as_micro_batch(sequences, groups.layout.tp_size)
    with evaluation_mode(model):
        rows = forward_rows(model, model.config, groups, [micro_batch])
    values: list[float] = []
    if rows:
        labels_T = torch.tensor([i for ids in sequences for i in ids[1:]], device=rows[0].device)
        with torch.no_grad():
            loss_T = linear_cross_entropy(
                rows[0],
                head_weight(model),
                labels_T,
                group=groups.pg.tp,
                valid_vocab_size=student.shapes.vocab_size,
            )
        assert isinstance(loss_T, Tensor)  # as always without token_weight_T
        values = (-loss_T).tolist()
    owner = groups.layout.last_stage_ranks(dp_rank=0)[0]
    values = broadcast_json(values, device=next(model.parameters()).device, src=owner)
    ends = list(itertools.accumulate(len(ids) - 1 for ids in sequences))
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


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


def _larger(a: float, b: float) -> float:
    # max(0.0, nan) is 0.0, which would hide a broken server
    return a if a >= b or a != a else b


def _largest_difference(got: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    differences = [abs(a - b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False
