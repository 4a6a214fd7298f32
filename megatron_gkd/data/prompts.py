"""Prompt files read into memory; every row is either encoded or reported."""

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

NUM_NAMED_ROWS = 10  # rows listed in an error message


@dataclass(frozen=True)
class RowPolicy:
    """Handling of unusable rows.

    Attributes:
        overlong: ``drop`` skips and counts overlong rows, ``error`` raises.
        max_bad_rows: More bad rows than this raise.
        completions_needed_by: Setting that requires a completion in every row, with the fix, for the error message;
            ``None``: completions are optional.
    """

    overlong: Literal["drop", "error"] = "drop"
    max_bad_rows: int = 0
    completions_needed_by: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The usable rows of one or more files, and the reasons for rejecting the others.

    Attributes:
        prompts: Usable rows, in file order.
        name: File names, for messages.
        fingerprint: SHA-256 (hex) of the kept rows and the vocabulary.
        bad_rows: ``file:line: reason`` of every bad row.
        overlong_rows: ``file:line: reason`` of every row dropped for its length.
        ignored_keys: Columns that no row uses.
    """

    prompts: tuple[Prompt, ...]
    name: str
    fingerprint: str
    bad_rows: tuple[str, ...] = ()
    overlong_rows: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()

    @property
    def num_bad(self) -> int:
        """Number of bad rows."""
        return len(self.bad_rows)

    @property
    def num_overlong(self) -> int:
        """Number of rows dropped because the prompt or the completion is too long."""
        return len(self.overlong_rows)

    def summary(self) -> str:
        """Return one line for the log."""
        num_completions = sum(prompt.completion_ids is not None for prompt in self.prompts)
        line = (
            f"{self.name}: {len(self.prompts)} prompts ({num_completions} with completion), "
            f"{self.num_bad} bad rows skipped, {self.num_overlong} overlong rows dropped"
        )
        return f"{line}, ignored keys: {', '.join(self.ignored_keys)}" if self.ignored_keys else line


@dataclass
class _Tally:
    """Rows read so far, by outcome."""

    prompts: list[Prompt] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    overlong: list[str] = field(default_factory=list)
    without_completion: list[str] = field(default_factory=list)
    ignored_keys: set[str] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)


def load_prompts(
    files: Sequence[RowFile], encoder: RowEncoder, policy: RowPolicy, *, max_rows: int | None = None
) -> PromptSet:
    """Read and encode all rows of the files.

    Args:
        files: Read in this order.
        encoder: Converts rows to prompts.
        policy: Handling of unusable rows.
        max_rows: Stop after this many prompts.

    Raises:
        DataError: The policy is violated or no row is usable; the message lists the rows and the fix.
    """
    tally = _Tally()
    tally.digest.update(tokenizer_fingerprint(encoder.tokenizer).encode())
    name = ", ".join(str(file.path) for file in files)
    rows = ((file, row) for file in files for row in file.read())
    for file, row in rows:
        _encode_row(file, row, encoder, tally)
        # Enough rows for the error message: a file of the wrong format is not read to its end.
        if len(tally.bad) >= policy.max_bad_rows + NUM_NAMED_ROWS or len(tally.prompts) == max_rows:
            break
    _check_policy(name, tally, policy)
    return PromptSet(
        prompts=tuple(tally.prompts),
        name=name,
        fingerprint=tally.digest.hexdigest(),
        bad_rows=tuple(tally.bad),
        overlong_rows=tuple(tally.overlong),
        ignored_keys=tuple(sorted(tally.ignored_keys)),
    )


def _encode_row(file: RowFile, row: RawRow, encoder: RowEncoder, tally: _Tally) -> None:
    location = file.location(row.number)
    try:
        columns = file.parse(row.content)
        prompt = encoder.encode(columns, number=row.number, file=file.index)
    except BadRow as error:
        tally.bad.append(f"{location}: {error}")
        log.info("Bad row %s", tally.bad[-1])
        return
    except OverlongRow as error:
        tally.overlong.append(f"{location}: {error}")
        return
    if prompt.completion_ids is None:
        tally.without_completion.append(location)
    # The text is hashed, not the token ids: some chat templates insert today's date (Llama 3.2), and a run must be able
    # to resume on another day. The length prefix keeps two adjacent rows from hashing like one joined row.
    content = content_bytes(row.content)
    tally.prompts.append(prompt)
    tally.ignored_keys |= encoder.unused_keys(columns)
    tally.digest.update(f"\n{row.number}:{len(content)}:".encode() + content)


def _check_policy(name: str, tally: _Tally, policy: RowPolicy) -> None:
    if len(tally.bad) > policy.max_bad_rows:
        raise too_many_bad_rows(name, tally.bad, policy.max_bad_rows)
    if policy.overlong == "error" and tally.overlong:
        raise DataError(
            f"{name} has {len(tally.overlong)} overlong rows; raise the limit, set data.truncation, or set "
            f"data.overlong_prompts: drop. {_list_first(tally.overlong)}"
        )
    if not tally.prompts:
        raise DataError(
            f"{name} has no usable prompt ({len(tally.bad)} bad, {len(tally.overlong)} overlong rows). "
            f"{_list_first(tally.bad + tally.overlong)}"
        )
    if policy.completions_needed_by and tally.without_completion:
        raise DataError(
            f"{name} has {len(tally.without_completion)} rows without completion, needed by "
            f"{policy.completions_needed_by}. {_list_first(tally.without_completion)}"
        )


def too_many_bad_rows(name: str, bad_rows: Sequence[str], limit: int) -> DataError:
    """Return the error that lists the first bad rows."""
    return DataError(
        f"{name} has more than data.max_bad_rows={limit} bad rows; correct them or raise the limit. "
        f"{_list_first(bad_rows)}"
    )


def _list_first(rows: Sequence[str]) -> str:
    return "First rows:" + "".join(f"\n  {row}" for row in rows[:NUM_NAMED_ROWS]) if rows else ""
