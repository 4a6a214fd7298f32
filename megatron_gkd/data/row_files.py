"""Files of rows, read one row at a time from any place on: JSON lines, plain text, Parquet, or a class of the user."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gkd.data.rows import DEFAULT_KEYS, BadRow, RowKeys
from megatron_gkd.data.tokenizer import DataError

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 8 * 1024 * 1024
"""A longer line is a bad row; it is skipped without being held in memory."""
PARQUET_ROWS = 256
"""Rows of a Parquet file that are decoded together."""
FINGERPRINT_BYTES = 1024 * 1024
"""What a file's fingerprint reads of its beginning and of its end."""

Content = bytes | Mapping[str, Any]


class Cursor(NamedTuple):
    """A place between two rows."""

    offset: int = 0
    """Bytes of a text file, rows of any other, that lie before it."""
    number: int = 0
    """Lines or rows that lie before it."""


START = Cursor()


class RawRow(NamedTuple):
    """A row as it stands in its file."""

    number: int
    """Line or row, counted from 1 as editors do."""
    content: Content
    end: Cursor
    """The place behind it."""


@dataclass(frozen=True)
class RowFile:
    """A file of JSON lines; other formats override ``read`` and ``parse``.

    Attributes:
        path: The file.
        keys: Names of the columns.
        index: Place of the file in the list of files.
    """

    path: Path
    keys: RowKeys = DEFAULT_KEYS
    index: int = 0

    def read(self, start: Cursor = START) -> Iterator[RawRow]:
        """The rows behind ``start`` that are not blank; of a line that is too long only the beginning."""
        with self.path.open("rb") as file:
            file.seek(start.offset)
            number = start.number
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                content = line
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                if content.strip():
                    yield RawRow(number, content, Cursor(file.tell(), number))

    def parse(self, content: Any) -> Mapping[str, Any]:
        """The columns of a row.

        Raises:
            BadRow: Too long, not UTF-8, not JSON, or not an object.
        """
        try:
            row = json.loads(_decode(content))
        except RecursionError as error:
            raise BadRow("nested too deeply") from error
        except ValueError as error:  # broken JSON, or a number with thousands of digits
            raise BadRow(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadRow(f"a JSON {type(row).__name__}, not an object with the key {self.keys.prompt}")
        return row

    def fingerprint(self) -> str:
        """SHA-256 (hex) of size, beginning and end; does not read a large file as a whole."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
        return digest.hexdigest()

    def place(self, number: int) -> str:
        """``file:line``, as messages name a row."""
        return f"{self.path}:{number}"


class TextFile(RowFile):
    """Plain text; each line is a prompt."""

    def parse(self, content: Any) -> Mapping[str, Any]:
        """See ``RowFile.parse``."""
        return {self.keys.prompt: _decode(content).rstrip("\r\n")}


class ParquetFile(RowFile):
    """Rows of a Parquet file; only the columns in ``keys`` are decoded."""

    def read(self, start: Cursor = START) -> Iterator[RawRow]:
        """See ``RowFile.read``.

        Raises:
            DataError: Not a Parquet file, or it has neither prompts nor conversations.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield from self._rows(file, start.number)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {error}; write it again") from error

    def parse(self, content: Any) -> Mapping[str, Any]:
        """The columns of a row; message fields that are null in this row are left out."""
        return {key: _without_null_fields(value) for key, value in content.items()}

    def _rows(self, file: Any, first: int) -> Iterator[RawRow]:
        columns = self._columns(file.schema_arrow.names)
        groups, skipped = list(range(file.num_row_groups)), 0
        while groups and skipped + file.metadata.row_group(groups[0]).num_rows <= first:
            skipped += file.metadata.row_group(groups.pop(0)).num_rows
        if not groups:
            return
        number = skipped
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                number += 1
                if number > first:
                    yield RawRow(number, row, Cursor(number, number))

    def _columns(self, names: list[str]) -> list[str]:
        if self.keys.prompt not in names and self.keys.messages not in names:
            raise DataError(
                f"{self.path} has neither the column {self.keys.prompt} nor {self.keys.messages}, only "
                f"{', '.join(names)}; set data.prompt_key or data.messages_key"
            )
        return [name for name in names if name in self.keys]


@dataclass(frozen=True)
class CustomFile(RowFile):
    """Rows that ``make(path)`` gives, one mapping after the other."""

    make: Callable[[Path], Iterable[Mapping[str, Any]]] = field(kw_only=True)

    def read(self, start: Cursor = START) -> Iterator[RawRow]:
        """See ``RowFile.read``; rows before ``start`` are made and passed over."""
        rows = itertools.islice(iter(self.make(self.path)), start.number, None)
        for number, row in enumerate(rows, start.number + 1):
            yield RawRow(number, row, Cursor(number, number))

    def parse(self, content: Any) -> Mapping[str, Any]:
        """See ``RowFile.parse``."""
        if not isinstance(content, Mapping):
            raise BadRow(f"data.dataset_class gave a {type(content).__name__}, not a mapping of columns")
        return content

    def fingerprint(self) -> str:
        """See ``RowFile.fingerprint``; of a folder, the names and sizes of its files."""
        if self.path.is_file():
            return super().fingerprint()
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        facts = [(str(file.relative_to(self.path)), file.stat().st_size) for file in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_row_files(
    paths: Iterable[Path],
    keys: RowKeys = DEFAULT_KEYS,
    *,
    make: Callable[[Path], Iterable[Mapping[str, Any]]] | None = None,
) -> list[RowFile]:
    """Readers for the files: ``make`` if given, else by the ends of their names.

    Raises:
        DataError: A file does not exist.
    """
    return [_open(path, keys, index, make) for index, path in enumerate(paths)]


def _open(path: Path, keys: RowKeys, index: int, make: Callable[[Path], Any] | None) -> RowFile:
    if not path.exists():
        raise DataError(f"data.prompts: {path} does not exist")
    if make is not None:
        return CustomFile(path, keys, index, make=make)
    by_suffix = {".parquet": ParquetFile, ".txt": TextFile}
    return by_suffix.get(path.suffix, RowFile)(path, keys, index)


def content_bytes(content: Content) -> bytes:
    """A row's content, for a digest."""
    return (
        content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, default=repr).encode()
    )


def _decode(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error.reason} at byte {error.start}") from error


def _without_null_fields(value: Any) -> Any:
    """Messages whose optional fields are columns of the file have them in every row, mostly as null."""
    if isinstance(value, list):
        return [_without_null_fields(item) for item in value]
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value
