"""Move slices between a rank's parameters and safetensors files, without gathering anything.

The writer lays the file out first (one rank), then every rank writes its own slices into the mapped file. The format is
that of https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, the data.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_gkd.reshard.layout import Slice

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT = 64
_BLOCK_ELEMENTS = 1 << 21


class HfFolder:
    """Read access to the safetensors files of a Hugging Face folder, slice by slice."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of = _index(folder)
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor.

        Raises:
            ValueError: Not a floating-point format that a model can be trained from.
        """
        kind = self._handle(name).get_slice(name).get_dtype()
        known = {text: dtype for dtype, text in _DTYPE_NAMES.items()}
        if kind not in known:
            raise ValueError(f"{name} in {self.folder} has format {kind}; supported: {', '.join(known)}")
        return known[kind]

    def read(self, name: str, spans: Sequence[tuple[int, int]]) -> Tensor:
        """One block of a tensor; only its bytes are read."""
        return self._handle(name).get_slice(name)[tuple(slice(*span) for span in spans)]

    def mapped(self, name: str) -> Tensor:
        """A whole tensor as the file's own pages: it takes memory only while it is looked at. Not to be changed."""
        return self._handle(name).get_tensor(name)

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name!r}; is config.json from the same model?")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]


def read_slices(parameters: Mapping[str, Tensor], source: HfFolder, slices: Sequence[Slice]) -> None:
    """Fill a rank's parameters from a Hugging Face folder, converted to each parameter's type.

    Raises:
        ValueError: A parameter gets no slice, or the folder lacks a tensor.
    """
    if missing := parameters.keys() - {piece.parameter for piece in slices}:
        raise ValueError(f"no weights known for the parameters {sorted(missing)}")
    with torch.no_grad():
        for piece in _blocks(slices):
            block = source.read(piece.tensor, piece.full)
            parameters[piece.parameter].data[_index_of(piece.local)].copy_(block)


def find_difference(
    parameters: Mapping[str, Tensor], folder: HfFolder, slices: Sequence[Slice]
) -> str | None:
    """Name of the first tensor in ``folder`` that is not bit for bit what the parameters hold, or ``None``."""
    for piece in _blocks(slices):
        own = parameters[piece.parameter].data[_index_of(piece.local)]
        other = folder.read(piece.tensor, piece.full)
        if own.dtype != other.dtype or not torch.equal(_bytes_of(own), _bytes_of(other)):
            return piece.tensor
    return None


def _blocks(slices: Sequence[Slice]) -> Iterator[Slice]:
    """The slices in blocks of a few MB, so that reading never doubles a large tensor."""
    return (block for piece in slices if piece.num_elements for block in piece.row_blocks(_BLOCK_ELEMENTS))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)  # as numbers, NaN would differ from itself


class MappedSafetensors:
    """A safetensors file of fixed layout that several processes fill in place."""

    def __init__(self, tensors: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        self._dtype, self._shapes = dtype, dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in self._shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            self._offsets[name] = position
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        # so that every tensor starts at a multiple of its item size
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self.num_data_bytes = position
        self._start = len(self._header)

    def create(self, file: Path) -> None:
        """Lay the file out with undefined data; one process does this before any writes.

        Raises:
            OSError: No space. The space is reserved here, so that no later write can fail half-way.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, self._start + self.num_data_bytes)
            os.posix_fallocate(descriptor, 0, self._start + self.num_data_bytes)
            os.pwrite(descriptor, self._header, 0)
        finally:
            os.close(descriptor)

    def write(self, file: Path, parameters: Mapping[str, Tensor], slices: Sequence[Slice]) -> int:
        """Copy this rank's slices into the file; returns the number of bytes written."""
        mapped = torch.from_file(
            str(file), shared=True, size=self._start + self.num_data_bytes, dtype=torch.uint8
        )
        num_bytes = 0
        with torch.no_grad():
            for name, pieces in groupby(slices, key=lambda piece: piece.parameter):
                source = parameters[name].data  # asked for once: it may be made at this moment
                for piece in pieces:
                    target = self._tensor(mapped, piece.tensor)
                    target[_index_of(piece.full)] = source[_index_of(piece.local)].to(self._dtype)
                    num_bytes += piece.num_elements * self._dtype.itemsize
        return num_bytes

    def _tensor(self, mapped: Tensor, name: str) -> Tensor:
        shape = self._shapes[name]
        start = self._start + self._offsets[name]
        stop = start + torch.Size(shape).numel() * self._dtype.itemsize
        return mapped[start:stop].view(self._dtype).view(shape)


def _index_of(spans: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in spans)


def _index(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; convert the checkpoint to safetensors first")
    names = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as handle:
            names.update(dict.fromkeys(handle.keys(), file))
    return names
