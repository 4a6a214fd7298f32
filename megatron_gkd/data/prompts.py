"""Prompt files read as a whole: their usable rows, encoded, with an account of the others.

Rows that cannot be used are counted and reported, never passed over in silence.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_gkd.data.row_files import RawRow, RowFile, content_bytes
from megatron_gkd.data.rows import BadRow, OverlongRow, RowEncoder
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.tokenizer import DataError, tokenizer_fingerprint

log = logging.getLogger(__name__)

NUM_NAMED_ROWS = 10
"""How many rows an error names."""


@dataclass(frozen=True)
class RowPolicy:
    """What is done about rows that cannot be used.

    Attributes:
        overlong: ``drop`` counts and leaves out rows that are too long, ``error`` refuses their file.
        max_bad_rows: More bad rows than this refuse the files.
        completions_needed_by: What needs a completion in every row, and the way out; ``None``: nothing does.
    """

    overlong: Literal["drop", "error"] = "drop"
    max_bad_rows: int = 0
    completions_needed_by: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The usable rows of one or more files, with an account of the others."""

    prompts: tuple[Prompt, ...]
    name: str
    """Of the files, for messages."""
    fingerprint: str
    """SHA-256 (hex) of the kept rows and the vocabulary. Made from the files' text and not from token ids, because
    some chat templates write the day's date, and a run must be able to resume on another day."""
    bad_rows: tuple[str, ...] = ()
    """``file:line: reason`` of every bad row."""
    overlong_rows: tuple[str, ...] = ()
    """``file:line: reason`` of every row dropped for its length."""
    ignored_keys: tuple[str, ...] = ()

    @property
    def num_bad(self) -> int:
        """Rows that could not be read."""
        return len(self.bad_rows)

    @property
    def num_overlong(self) -> int:
        """Rows dropped because prompt or completion is too long."""
        return len(self.overlong_rows)

    def summary(self) -> str:
        """One line for the log."""
        num_completions = sum(prompt.completion_ids is not None for prompt in self.prompts)
        line = (
            f"{self.name}: {len(self.prompts)} prompts ({num_completions} with completion), "
            f"{self.num_bad} bad rows skipped, {self.num_overlong} overlong rows dropped"
        )
        return f"{line}, ignored keys: {', '.join(self.ignored_keys)}" if self.ignored_keys else line


@dataclass
class _Tally:
    """What reading the files has found so far."""

    prompts: list[Prompt] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    overlong: list[str] = field(default_factory=list)
    without_completion: list[str] = field(default_factory=list)
    ignored_keys: set[str] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)


def load_prompts(
    files: Sequence[RowFile], encoder: RowEncoder, policy: RowPolicy, *, max_rows: int | None = None
) -> PromptSet:
    """Read and encode files, row by row.

    Args:
        files: In the order of the rows.
        encoder: Turns rows into prompts.
        policy: What is done about rows that cannot be used.
        max_rows: Stop after this many prompts.

    Raises:
        DataError: Names file and lines of what is wrong, and what to change.
    """
    tally = _Tally()
    tally.digest.update(tokenizer_fingerprint(encoder.tokenizer).encode())
    name = ", ".join(str(file.path) for file in files)
    rows = ((file, row) for file in files for row in file.read())
    for file, row in rows:
        _take_row(file, row, encoder, tally)
        # enough to name; the rest of a wrong file need not be read
        if len(tally.bad) >= policy.max_bad_rows + NUM_NAMED_ROWS or len(tally.prompts) == max_rows:
            break
    _refuse(name, tally, policy)
    return PromptSet(
        prompts=tuple(tally.prompts),
        name=name,
        fingerprint=tally.digest.hexdigest(),
        bad_rows=tuple(tally.bad),
        overlong_rows=tuple(tally.overlong),
        ignored_keys=tuple(sorted(tally.ignored_keys)),
    )


def _take_row(file: RowFile, row: RawRow, encoder: RowEncoder, tally: _Tally) -> None:
    place = file.place(row.number)
    try:
        columns = file.parse(row.content)
        prompt = encoder.encode(columns, number=row.number, file=file.index)
    except BadRow as error:
        tally.bad.append(f"{place}: {error}")
        log.info("Bad row %s", tally.bad[-1])
        return
    except OverlongRow as error:
        tally.overlong.append(f"{place}: {error}")
        return
    if prompt.completion_ids is None:
        tally.without_completion.append(place)
    content = content_bytes(row.content)
    tally.prompts.append(prompt)
    tally.ignored_keys |= encoder.unused_keys(columns)
    tally.digest.update(f"\n{row.number}:{len(content)}:".encode() + content)


def _refuse(name: str, tally: _Tally, policy: RowPolicy) -> None:
    if len(tally.bad) > policy.max_bad_rows:
        raise too_many_bad_rows(name, tally.bad, policy.max_bad_rows)
    if policy.overlong == "error" and tally.overlong:
        raise DataError(
            f"{name} has {len(tally.overlong)} overlong rows; raise the limit, set data.truncation, or set "
            f"data.overlong_prompts: drop. {_name_first(tally.overlong)}"
        )
    if not tally.prompts:
        raise DataError(
            f"{name} has no usable prompt ({len(tally.bad)} bad, {len(tally.overlong)} overlong rows). "
            f"{_name_first(tally.bad + tally.overlong)}"
        )
    if policy.completions_needed_by and tally.without_completion:
        raise DataError(
            f"{name} has {len(tally.without_completion)} rows without completion, needed by "
            f"{policy.completions_needed_by}. {_name_first(tally.without_completion)}"
        )


def too_many_bad_rows(name: str, bad_rows: Sequence[str], limit: int) -> DataError:
    """The error that names them."""
    return DataError(
        f"{name} has more than data.max_bad_rows={limit} bad rows; correct them or raise the limit. "
        f"{_name_first(bad_rows)}"
    )


def _name_first(rows: Sequence[str]) -> str:
    return "First rows:" + "".join(f"\n  {row}" for row in rows[:NUM_NAMED_ROWS]) if rows else ""
