"""Push the student's weights into SGLang, and prove that they arrived.

Every rank writes its own slices into one mapped safetensors file on tmpfs; nothing is gathered. The server answers
"success" to a file without a whole layer, so nothing it says counts as proof: before the request every byte must have
been written exactly once, after it the version must be the new one and the log-probabilities of a probe must agree.

Shapes: T = rows of the probe, H = hidden size.
"""

import logging
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.parallel.collectives import any_rank, broadcast_json, reduce_values
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.reshard.layout import (
    Slice,
    WeightLayout,
    all_owned_slices,
    check_coverage,
    hf_tensors,
    owned_slices,
)
from megatron_gkd.reshard.transport import MappedSafetensors
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.errors import EngineError

log = logging.getLogger(__name__)

WEIGHT_FILE = "model.safetensors"


class WeightPushFailed(EngineError):
    """The server does not have the student's weights; the message says how that was noticed."""


@dataclass(frozen=True)
class PushReport:
    """What a push moved and proved.

    Attributes:
        num_bytes: Bytes that all ranks wrote together.
        max_difference: Largest difference in log-probability between server and trainer over the probe, in nats.
        num_probe_tokens: Tokens compared.
    """

    num_bytes: int
    max_difference: float
    num_probe_tokens: int


class SharedWeightFile:
    """One safetensors file that all ranks of one copy of the student fill together, in two folders by turns.

    The server may still map the file of the last push, so the next one goes elsewhere.

    Args:
        folder: On a file system that the ranks and the server share; best tmpfs.
        weights: The student's weights and layout.
        parameters: This rank's weights by name, as they are to be pushed.
        groups: The student's layout and groups.
        dtype: Number format in the file.
        device: The device of this rank.

    Raises:
        ValueError: The slices of all ranks do not cover the model exactly once.
    """

    def __init__(
        self,
        folder: Path,
        weights: WeightLayout,
        parameters: Mapping[str, Tensor],
        groups: ModelGroups,
        dtype: torch.dtype,
        device: torch.device,
    ):
        check_coverage(weights.shapes, all_owned_slices(weights))
        self._folder, self._parameters, self._device = folder, parameters, device
        self._file = MappedSafetensors(hf_tensors(weights.shapes), dtype)
        self._slices: list[Slice] = []
        if groups.dp_rank == 0:
            self._slices = owned_slices(
                weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=parameters
            )

    def write(self, version: int) -> tuple[Path, int]:
        """(folder, bytes) of the complete file; collective over all ranks.

        Raises:
            WeightPushFailed: On all ranks, if a rank does not see the file or not every byte was written.
        """
        folder = self._folder / f"slot_{version % 2}"
        file = folder / WEIGHT_FILE
        nonce = secrets.token_hex(8)
        error = None
        if dist.get_rank() == 0:
            try:
                self._file.create(file)
                (folder / "nonce").write_text(nonce)
            except OSError as problem:
                error = f"cannot write the weights to {file}: {problem}; set rollout.push_dir to a folder with room"
        error, nonce = broadcast_json([error, nonce], device=self._device)
        if error:
            raise WeightPushFailed(error)
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

    def remove(self) -> None:
        """Delete the folder; one rank calls it."""
        shutil.rmtree(self._folder, ignore_errors=True)


class WeightPusher:
    """Hands the student's weights to every server and compares a probe.

    Args:
        file: Where the weights go.
        clients: One per server; used on rank 0 only.
        probe: () -> (token ids of the probe sequences, trainer's log-probability of every token after the first);
            collective, the same result on all ranks.
        tolerance: Largest difference in nats.
        device: The device of this rank.
    """

    def __init__(
        self,
        file: SharedWeightFile,
        clients: Sequence[SglangClient],
        probe: Callable[[], tuple[list[list[int]], list[list[float]]]],
        tolerance: float,
        device: torch.device,
    ):
        self._file, self._clients, self._probe = file, clients, probe
        self._tolerance, self._device = tolerance, device
        self.last: PushReport | None = None

    def push(self, version: int) -> None:
        """Bring all servers to the student's present weights as ``version``; collective over all ranks.

        Raises:
            WeightPushFailed: On all ranks; the servers must not be used any more.
        """
        folder, num_bytes = self._file.write(version)
        sequences, expected = self._probe()
        outcome = (
            self._load_and_compare(folder, version, sequences, expected) if dist.get_rank() == 0 else None
        )
        error, difference = broadcast_json(outcome, device=self._device)
        if error:
            raise WeightPushFailed(error)
        self.last = PushReport(num_bytes, difference, sum(map(len, expected)))

    def close(self) -> None:
        """Remove the files; one rank calls it."""
        self._file.remove()

    def _load_and_compare(self, folder: Path, version: int, sequences, expected) -> tuple[str | None, float]:
        worst = 0.0
        try:
            for client in self._clients:
                client.update_weights_from_disk(folder, version)
                worst = _larger(worst, _largest_difference(client.score(sequences), expected))
        except Exception as error:  # of any kind: the other ranks already wait for the outcome
            return f"push of version {version}: {type(error).__name__}: {error}", worst
        if not worst <= self._tolerance:  # also when it is not a number
            return (
                f"push of version {version}: after it a log-probability of the server differs from the trainer's by "
                f"{worst:.3g} nats, more than rollout.probe_tolerance={self._tolerance:g}; the server does not have the "
                "student's weights, or computes in another precision"
            ), worst
        return None, worst


def _larger(a: float, b: float) -> float:
    # max(0.0, nan) is 0.0
    return a if a >= b or a != a else b


def _largest_difference(got: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    differences = [abs(a - b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False
