"""Prompts read while training, for files larger than memory.

Rows are held in blocks of consecutive rows of one file. A block is shuffled in itself, and its place in the file is all
that a checkpoint needs of it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from megatron_gkd.data.prompts import RowPolicy, too_many_bad_rows
from megatron_gkd.data.row_files import START, Cursor, RawRow, RowFile
from megatron_gkd.data.rows import BadRow, OverlongRow, RowEncoder
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.streams import require_same, shuffled_order
from megatron_gkd.data.tokenizer import DataError, tokenizer_fingerprint

log = logging.getLogger(__name__)


class StreamedPrompts:
    """A ``PromptStream`` that holds one block of rows.

    Reading the first prompt when it is made shows a wrong file at once.

    Args:
        files: Read one after the other in each pass.
        encoder: Turns rows into prompts, when they are taken.
        policy: What is done about rows that cannot be used; they are counted anew in each pass, and the log tells at its
            end how many there were.
        seed: Of the order within the blocks.
        shuffle: False keeps the order of the files.
        block_rows: Rows of a block.

    Raises:
        DataError: A file cannot be read, or its first rows cannot be used.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        encoder: RowEncoder,
        policy: RowPolicy,
        *,
        seed: int,
        shuffle: bool,
        block_rows: int,
    ) -> None:
        self._files, self._encoder, self._policy = tuple(files), encoder, policy
        self._seed, self._shuffle, self._block_rows = seed, shuffle, block_rows
        self._name = ", ".join(str(file.path) for file in files)
        self._fingerprint = _fingerprint(files, encoder)
        self._enter_pass(0)
        self._first = self._take_one()
        self._enter_pass(0)

    @property
    def prompts_per_pass(self) -> None:
        """See ``PromptStream``; nobody has counted the rows."""
        return

    def first_prompts(self, n: int) -> list[Prompt]:
        """See ``PromptStream``; one is kept."""
        return [self._first][:n]

    def take(self, n: int) -> list[Prompt]:
        """See ``PromptStream``.

        Raises:
            DataError: A row breaks the policy; equal on all ranks, because each reads the same rows.
        """
        return [self._take_one() for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        """See ``PromptStream``."""
        return {
            **self._identity(),
            "pass": self._pass,
            "file": self._file,
            "block": list(self._start),
            "position": self._position,
            "bad": list(self._bad),
            "overlong": self._num_overlong,
            "used": self._used,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``PromptStream``."""
        require_same(state, self._identity(), self._name)
        self._enter_pass(state["pass"])
        self._load_block(state["file"], Cursor(*state["block"]))
        self._position, self._bad, self._used = state["position"], list(state["bad"]), state["used"]
        self._num_overlong = state.get("overlong", 0)  # an earlier version did not count them

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "shuffle_rows": self._block_rows,
        }

    def _enter_pass(self, number: int) -> None:
        self._pass = number
        self._bad: list[str] = []  # of this pass
        self._num_overlong = 0  # rows dropped in this pass
        self._used = 0  # prompts given out in this pass
        self._load_block(0, START)

    def _load_block(self, file: int, start: Cursor) -> None:
        self._block: list[RawRow] = []  # the old one goes before the new one comes
        self._file, self._start, self._position = file, start, 0
        self._block = list(itertools.islice(self._files[file].read(start), self._block_rows))
        key = f"{self._seed}/{self._pass}/{file}/{start.number}"
        size = len(self._block)
        self._order = shuffled_order(size, key) if self._shuffle else list(range(size))

    def _take_one(self) -> Prompt:
        while True:
            if self._position == len(self._block):
                self._advance()
                continue
            row = self._block[self._order[self._position]]
            self._position += 1
            prompt = self._encode(self._files[self._file], row)
            if prompt is not None:
                self._used += 1
                return prompt

    def _advance(self) -> None:
        """To the next block, file or pass."""
        if len(self._block) == self._block_rows:
            self._load_block(self._file, self._block[-1].end)
        elif self._file + 1 < len(self._files):
            self._load_block(self._file + 1, START)
        elif not self._used:
            raise DataError(
                f"{self._name} has no usable prompt ({len(self._bad)} bad, {self._num_overlong} overlong rows)"
            )
        else:
            log.info(
                "%s, pass %d: %d prompts, %d bad rows skipped, %d overlong rows dropped",
                self._name,
                self._pass + 1,
                self._used,
                len(self._bad),
                self._num_overlong,
            )
            self._enter_pass(self._pass + 1)

    def _encode(self, file: RowFile, row: RawRow) -> Prompt | None:
        place = file.place(row.number)
        try:
            prompt = self._encoder.encode(file.parse(row.content), number=row.number, file=file.index)
        except BadRow as error:
            self._note_bad_row(f"{place}: {error}")
            return None
        except OverlongRow as error:
            if self._policy.overlong == "error":
                raise DataError(
                    f"{place}: {error}; raise the limit, set data.truncation, or set data.overlong_prompts: drop"
                ) from error
            log.info("Left out %s: %s", place, error)
            self._num_overlong += 1
            return None
        if self._policy.completions_needed_by and prompt.completion_ids is None:
            raise DataError(f"{place} has no completion, needed by {self._policy.completions_needed_by}")
        return prompt

    def _note_bad_row(self, row: str) -> None:
        log.info("Bad row %s", row)
        self._bad.append(row)
        if len(self._bad) > self._policy.max_bad_rows:
            raise too_many_bad_rows(str(self._files[self._file].path), self._bad, self._policy.max_bad_rows)


def _fingerprint(files: Sequence[RowFile], encoder: RowEncoder) -> str:
    parts = [tokenizer_fingerprint(encoder.tokenizer), *(file.fingerprint() for file in files)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
