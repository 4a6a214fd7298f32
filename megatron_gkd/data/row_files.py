"""Row readers for JSON Lines, plain text, Parquet and user-defined datasets, resumable at any row."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import override

from megatron_gkd.data.rows import DEFAULT_KEYS, BadRow, RowKeys
from megatron_gkd.data.tokenizer import DataError

log = logging.getLogger(__name__)

# A longer line is a bad row. Without a limit, a file that lacks newlines would be read into memory as one line.
MAX_LINE_BYTES = 8 * 1024 * 1024
PARQUET_ROWS = 256  # decoded per batch
FINGERPRINT_BYTES = 1024 * 1024  # hashed at each end of a file

Content = bytes | Mapping[str, Any]


class Cursor(NamedTuple):
    """A position between two rows."""

    offset: int = 0  # bytes before it in a text file, rows in any other format
    number: int = 0  # lines or rows before it


START = Cursor()


class RawRow(NamedTuple):
    """A row before parsing."""

    number: int  # line or row number, from 1 as in editors
    content: Content
    end: Cursor  # position after the row


@dataclass(frozen=True)
class RowFile:
    """A JSON Lines file; other formats override ``read`` and ``parse``.

    Attributes:
        path: The file.
        keys: Column names.
        index: Index of the file in the list of files.
    """

    path: Path
    keys: RowKeys = DEFAULT_KEYS
    index: int = 0

    def read(self, start: Cursor = START) -> Iterator[RawRow]:
        """Yield the non-blank rows after ``start``; overlong lines are truncated."""
        # Binary mode: offsets are bytes and seek is O(1), and a line that is not UTF-8 fails alone.
        with self.path.open("rb") as file:
            file.seek(start.offset)
            number = start.number
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                content = line
                while line and not line.endswith(b"\n"):  # discard the rest of an overlong line
                    line = file.readline(MAX_LINE_BYTES)
                if content.strip():
                    yield RawRow(number, content, Cursor(file.tell(), number))

    def parse(self, content: Any) -> Mapping[str, Any]:
        """Return the columns of a row.

        Raises:
            BadRow: Too long, not UTF-8, not JSON, or not an object.
        """
        try:
            row = json.loads(_decode(content))
        except RecursionError as error:
            raise BadRow("nested too deeply") from error
        except ValueError as error:  # JSONDecodeError, or an integer beyond sys.get_int_max_str_digits()
            raise BadRow(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadRow(f"a JSON {type(row).__name__}, not an object with the key {self.keys.prompt}")
        return row

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the size and of both ends of the file."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
        return digest.hexdigest()

    def location(self, number: int) -> str:
        """Return ``file:line`` for messages."""
        return f"{self.path}:{number}"


class TextFile(RowFile):
    """Plain text with one prompt per line."""

    @override
    def parse(self, content: Any) -> Mapping[str, Any]:
        return {self.keys.prompt: _decode(content).rstrip("\r\n")}


class ParquetFile(RowFile):
    """A Parquet file; only the columns in ``keys`` are decoded."""

    @override
    def read(self, start: Cursor = START) -> Iterator[RawRow]:
        """Yield the rows after ``start``.

        Raises:
            DataError: Not a Parquet file, or it has neither prompts nor conversations.
        """
        # Imported here: pyarrow is 170 MB on disk and most runs read JSON Lines.
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield from self._rows(file, start.number)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} cannot be read as Parquet: {error}; write it again") from error

    @override
    def parse(self, content: Any) -> Mapping[str, Any]:
        """Return the columns of a row without null message fields."""
        return {key: _without_null_fields(value) for key, value in content.items()}

    def _rows(self, file: Any, first: int) -> Iterator[RawRow]:
        columns = self._columns(file.schema_arrow.names)
        groups, skipped = list(range(file.num_row_groups)), 0
        # A row group is the smallest unit that can be skipped without decoding it.
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
    """Rows yielded by iterating over ``make(path)``."""

    make: Callable[[Path], Iterable[Mapping[str, Any]]] = field(kw_only=True)

    @override
    def read(self, start: Cursor = START) -> Iterator[RawRow]:
        # A user's iterable cannot seek: rows before the cursor are produced and dropped.
        rows = itertools.islice(iter(self.make(self.path)), start.number, None)
        for number, row in enumerate(rows, start.number + 1):
            yield RawRow(number, row, Cursor(number, number))

    @override
    def parse(self, content: Any) -> Mapping[str, Any]:
        if not isinstance(content, Mapping):
            raise BadRow(f"data.dataset_class yielded a {type(content).__name__}, not a mapping of columns")
        return content

    @override
    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the file, or of a folder's file names and sizes."""
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
    """Return a reader per file, chosen by suffix unless ``make`` is given.

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
    """Return a row's content as bytes to be hashed."""
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
    # Arrow gives every struct of a column the same fields: {"role", "content"} becomes {..., "name": None} as soon
    # as one row of the file has a name, and the check of messages would refuse the extra key.
    if isinstance(value, list):
        return [_without_null_fields(item) for item in value]
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value
