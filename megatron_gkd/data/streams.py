"""Endless prompt streams with exact resume: in memory, streamed from disk, or mixed by weight."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from typing_extensions import override

from megatron_gkd.data.prompts import PromptSet, RowPolicy, too_many_bad_rows
from megatron_gkd.data.row_files import START, Cursor, RawRow, RowFile
from megatron_gkd.data.rows import BadRow, OverlongRow, RowEncoder
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.tokenizer import DataError, tokenizer_fingerprint

log = logging.getLogger(__name__)


class PromptsChanged(DataError):
    """Prompts or their order differ from the checkpoint; ``keys`` are the configuration keys responsible."""

    def __init__(self, message: str, keys: tuple[str, ...]):
        super().__init__(message)
        self.keys = keys


class PromptStream(Protocol):
    """An endless stream of prompts, epoch after epoch."""

    @property
    def prompts_per_epoch(self) -> int | None:
        """Number of prompts in one epoch, or ``None`` if unknown."""
        ...

    def first_prompts(self, n: int) -> list[Prompt]:
        """Return up to ``n`` prompts from the start of the files, without advancing."""
        ...

    def take(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts, across epoch boundaries."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume right after the last prompt taken before ``state_dict``.

        Raises:
            PromptsChanged: The state belongs to other prompts, another seed or another order; the stream is unchanged.
        """
        ...


class PromptLoader(PromptStream):
    """A stream over prompts in memory.

    Args:
        prompts: The prompts of one epoch.
        seed: Seeds the shuffle; the order depends on seed and epoch only.
        shuffle: False keeps the order of the files.
    """

    def __init__(self, prompts: PromptSet, *, seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0  # completed epochs
        self._position = 0  # prompts taken in this epoch
        self._order = self._order_of(0)

    @property
    @override
    def prompts_per_epoch(self) -> int:
        return len(self._prompts.prompts)

    @override
    def first_prompts(self, n: int) -> list[Prompt]:
        return list(self._prompts.prompts[:n])

    @override
    def take(self, n: int) -> list[Prompt]:
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            indices = self._order[self._position : self._position + n - len(taken)]
            taken += [self._prompts.prompts[index] for index in indices]
            self._position += len(indices)
        return taken

    def _order_of(self, epoch: int) -> list[int]:
        size = len(self._prompts.prompts)
        return shuffled_order(size, f"{self._seed}/{epoch}") if self._shuffle else list(range(size))

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self._prompts.fingerprint, "seed": self._seed, "shuffle": self._shuffle}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_identity(state, self._identity(), self._prompts.name)
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)


class StreamedPrompts(PromptStream):
    """A stream over files larger than memory, one block of consecutive rows at a time.

    Args:
        files: Read one after the other in each epoch.
        encoder: Converts rows to prompts when they are taken.
        policy: Handling of unusable rows, which are counted and logged per epoch.
        seed: Seeds the shuffle within each block.
        shuffle: False keeps the order of the files.
        block_rows: Rows per block.

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
        # Taking one prompt here reports a wrong file before the models are loaded.
        self._start_epoch(0)
        self._first = self._take_one()
        self._start_epoch(0)

    @property
    @override
    def prompts_per_epoch(self) -> None:
        # Counting the rows would read all files before the first iteration.
        return

    @override
    def first_prompts(self, n: int) -> list[Prompt]:
        """Return at most one prompt, whatever ``n``."""
        return [self._first][:n]

    @override
    def take(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts.

        Raises:
            DataError: A row violates the policy; the same on all ranks, because each reads the same rows.
        """
        return [self._take_one() for _ in range(n)]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "pass": self._epoch,
            "file": self._file,
            "block": list(self._start),
            "position": self._position,
            "bad": list(self._bad),
            "overlong": self._num_overlong,
            "used": self._used,
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_identity(state, self._identity(), self._name)
        self._start_epoch(state["pass"])
        self._load_block(state["file"], Cursor(*state["block"]))
        self._position, self._bad, self._used = state["position"], list(state["bad"]), state["used"]
        self._num_overlong = state.get("overlong", 0)  # absent in checkpoints of earlier versions

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "shuffle_rows": self._block_rows,
        }

    def _start_epoch(self, number: int) -> None:
        self._epoch = number
        # counted per epoch
        self._bad: list[str] = []
        self._num_overlong = 0
        self._used = 0
        self._load_block(0, START)

    def _load_block(self, file: int, start: Cursor) -> None:
        self._block: list[RawRow] = []  # freed before the next block is read: only one is alive
        self._file, self._start, self._position = file, start, 0
        self._block = list(itertools.islice(self._files[file].read(start), self._block_rows))
        # The order is a function of the block's position, so a checkpoint stores that and not the permutation.
        key = f"{self._seed}/{self._epoch}/{file}/{start.number}"
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
        """Load the next block, file or epoch."""
        if len(self._block) == self._block_rows:
            self._load_block(self._file, self._block[-1].end)
        elif self._file + 1 < len(self._files):
            self._load_block(self._file + 1, START)
        elif not self._used:  # the next epoch would not yield a prompt either
            raise DataError(
                f"{self._name} has no usable prompt ({len(self._bad)} bad, {self._num_overlong} overlong rows)"
            )
        else:
            log.info(
                "%s, epoch %d: %d prompts, %d bad rows skipped, %d overlong rows dropped",
                self._name,
                self._epoch + 1,
                self._used,
                len(self._bad),
                self._num_overlong,
            )
            self._start_epoch(self._epoch + 1)

    def _encode(self, file: RowFile, row: RawRow) -> Prompt | None:
        location = file.location(row.number)
        try:
            prompt = self._encoder.encode(file.parse(row.content), number=row.number, file=file.index)
        except BadRow as error:
            self._record_bad_row(f"{location}: {error}")
            return None
        except OverlongRow as error:
            if self._policy.overlong == "error":
                raise DataError(
                    f"{location}: {error}; raise the limit, set data.truncation, or set data.overlong_prompts: drop"
                ) from error
            log.info("Dropped %s: %s", location, error)
            self._num_overlong += 1
            return None
        if self._policy.completions_needed_by and prompt.completion_ids is None:
            raise DataError(f"{location} has no completion, needed by {self._policy.completions_needed_by}")
        return prompt

    def _record_bad_row(self, row: str) -> None:
        log.info("Bad row %s", row)
        self._bad.append(row)
        if len(self._bad) > self._policy.max_bad_rows:
            raise too_many_bad_rows(str(self._files[self._file].path), self._bad, self._policy.max_bad_rows)


class MixedPrompts(PromptStream):
    """A weighted mixture of streams, deterministic and balanced at every prompt.

    Args:
        streams: One per file.
        weights: One positive weight per stream.
    """

    def __init__(self, streams: Sequence[PromptStream], weights: Sequence[float]) -> None:
        self._streams, self._weights = tuple(streams), tuple(weights)
        self._taken = [0] * len(streams)

    @property
    @override
    def prompts_per_epoch(self) -> None:
        # The streams end their epochs independently of each other.
        return

    @override
    def first_prompts(self, n: int) -> list[Prompt]:
        return [prompt for stream in self._streams for prompt in stream.first_prompts(n)][:n]

    @override
    def take(self, n: int) -> list[Prompt]:
        return [self._take_one() for _ in range(n)]

    def _take_one(self) -> Prompt:
        total, num = sum(self._weights), sum(self._taken) + 1
        # Largest deficit first, not a random draw: no share is ever off by 2 prompts, and counts are the whole state.
        deficits = [w * num / total - taken for w, taken in zip(self._weights, self._taken, strict=True)]
        index = deficits.index(max(deficits))
        self._taken[index] += 1
        return self._streams[index].take(1)[0]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": list(self._weights),
            "taken": list(self._taken),
            "streams": [stream.state_dict() for stream in self._streams],
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_identity(state, {"weights": list(self._weights)}, "data.prompts")
        # The second stream may refuse after the first has moved; all are restored, because the caller may go on with
        # checkpoint.allow_changes and then reads every stream from its beginning.
        before = [stream.state_dict() for stream in self._streams]
        try:
            for stream, own in zip(self._streams, state["streams"], strict=True):
                stream.load_state_dict(own)
        except PromptsChanged:
            for stream, own in zip(self._streams, before, strict=True):
                stream.load_state_dict(own)
            raise
        self._taken = list(state["taken"])


def shuffled_order(size: int, key: str) -> list[int]:
    """Return a permutation of ``range(size)`` determined by ``key``."""
    # Sorted by hash: the permutations of random and numpy are not guaranteed to be stable across versions, and a run
    # may be resumed under another one.
    keys = [hashlib.blake2b(f"{key}/{index}".encode(), digest_size=16).digest() for index in range(size)]
    return sorted(range(size), key=keys.__getitem__)


# Configuration key behind each part of a stream's identity.
_SETTINGS = {
    "fingerprint": "data.prompts",
    "seed": "train.seed",
    "shuffle": "data.shuffle",
    "shuffle_rows": "data.shuffle_rows",
    "weights": "data.weights",
}


def _check_identity(state: Mapping[str, Any], identity: Mapping[str, Any], name: str) -> None:
    """Check that ``state`` belongs to a stream with this identity.

    Raises:
        PromptsChanged: Lists what differs, both values, and the keys to set back.
    """
    if missing := identity.keys() - state.keys():
        keys = ("data.streaming", "data.weights")
        values = f"a stream of another kind, without {', '.join(sorted(missing))}"
    else:
        different = [part for part, value in identity.items() if state[part] != value]
        if not different:
            return
        keys = tuple(_SETTINGS[part] for part in different)
        values = ", ".join(f"{part} {state[part]!r} (now {identity[part]!r})" for part in different)
    raise PromptsChanged(
        f"the checkpoint was written for other prompts than {name}: {values}; set {', '.join(keys)} back, or read the "
        f"current prompts from the beginning with checkpoint.allow_changes=[{','.join(keys)}]",
        keys,
    )


def _fingerprint(files: Sequence[RowFile], encoder: RowEncoder) -> str:
    parts = [tokenizer_fingerprint(encoder.tokenizer), *(file.fingerprint() for file in files)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
