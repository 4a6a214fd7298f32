"""Transfer of slices between a rank's parameters and safetensors files, without gathering.

One rank creates the file, then every rank writes its slices into the mapped file. The safetensors format is 8 bytes of header
length, a JSON header and the data (https://github.com/huggingface/safetensors).
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
_BLOCK_ELEMENTS = 1 << 21  # 8 MiB of fp32


class HfFolder:
    """Read access to the safetensors files of a Hugging Face folder, slice by slice."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of = _index(folder)
        self._open: dict[
            Path, Any
        ] = {}  # opened on first use: a rank of a large model needs few of the files

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type of a tensor.

        Raises:
            ValueError: Not a supported floating-point type, such as a quantized format.
        """
        dtype_name = self._handle(name).get_slice(name).get_dtype()
        known = {text: dtype for dtype, text in _DTYPE_NAMES.items()}
        if dtype_name not in known:
            raise ValueError(
                f"{name} in {self.folder} has data type {dtype_name}; supported: {', '.join(known)}"
            )
        return known[dtype_name]

    def read(self, name: str, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Read one block of a tensor, and no other bytes."""
        return self._handle(name).get_slice(name)[tuple(slice(*span) for span in spans)]

    def mapped(self, name: str) -> Tensor:
        """Return a tensor backed by the mapped file. Must not be modified."""
        return self._handle(name).get_tensor(name)

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.folder} has no tensor {name!r}; is config.json from the same model?")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]


def read_slices(parameters: Mapping[str, Tensor], source: HfFolder, slices: Sequence[Slice]) -> None:
    """Fill a rank's parameters from a Hugging Face folder, cast to their data types.

    Raises:
        ValueError: A parameter has no slice, or the folder lacks a tensor.
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
    """Return the first tensor in ``folder`` that is not bit-equal to the parameters, or ``None``."""
    for piece in _blocks(slices):
        own = parameters[piece.parameter].data[_index_of(piece.local)]
        other = folder.read(piece.tensor, piece.full)
        if own.dtype != other.dtype or not torch.equal(_bytes_of(own), _bytes_of(other)):
            return piece.tensor
    return None


def _blocks(slices: Sequence[Slice]) -> Iterator[Slice]:
    # Blocks of a few MB: reading a large tensor at once would double its memory.
    return (block for piece in slices if piece.num_elements for block in piece.row_blocks(_BLOCK_ELEMENTS))


def _bytes_of(tensor: Tensor) -> Tensor:
    # Compared as bytes: NaN differs from itself, and -0 equals 0.
    return tensor.cpu().contiguous().view(torch.uint8)


class MappedSafetensors:
    """A safetensors file with a fixed header that several processes fill in place."""

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
        # Data starts at a multiple of 64, so that tensors are aligned to their item size: view(dtype) requires it.
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self.num_data_bytes = position
        self._start = len(self._header)

    def create(self, file: Path) -> None:
        """Create the file with undefined data. Called by one process before any ``write``.

        Raises:
            OSError: Not enough space on the device.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, self._start + self.num_data_bytes)
            # ftruncate makes a sparse file; on a full tmpfs, a write into its mapping would end in SIGBUS.
            os.posix_fallocate(descriptor, 0, self._start + self.num_data_bytes)
            os.pwrite(descriptor, self._header, 0)
        finally:
            os.close(descriptor)

    def write(self, file: Path, parameters: Mapping[str, Tensor], slices: Sequence[Slice]) -> int:
        """Copy this rank's slices into the file; return the number of bytes written."""
        mapped = torch.from_file(
            str(file), shared=True, size=self._start + self.num_data_bytes, dtype=torch.uint8
        )
        num_bytes = 0
        with torch.no_grad():
            for name, pieces in groupby(slices, key=lambda piece: piece.parameter):
                # Once per parameter: with adapters, the mapping computes the merged weight on access.
                source = parameters[name].data
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
