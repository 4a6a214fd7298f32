"""The prompt file: JSON lines to encoded prompts, and the endless stream over them.

A line is ``{"prompt": text or [{"role": ..., "content": ...}, ...], "completion": text (optional)}``; other keys are
ignored and named in the summary. Lines that cannot be used are counted and reported, never passed over in silence.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_gkd.data.rows import BadRow, encode_completion, encode_prompt, parse_row, read_lines
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.tokenizer import DataError, Tokenizer, tokenizer_fingerprint

log = logging.getLogger(__name__)

NUM_NAMED_ROWS = 10
"""How many rows an error names."""


@dataclass(frozen=True)
class PromptSet:
    """The usable rows of a prompt file, with an account of the others."""

    prompts: tuple[Prompt, ...]
    path: Path
    fingerprint: str
    """SHA-256 (hex) of the kept lines and the vocabulary. Made from the file's text and not from token ids, because
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
            f"{self.path}: {len(self.prompts)} prompts ({num_completions} with completion), "
            f"{self.num_bad} bad rows skipped, {self.num_overlong} overlong rows dropped"
        )
        return f"{line}, ignored keys: {', '.join(self.ignored_keys)}" if self.ignored_keys else line


@dataclass
class _Tally:
    """What reading the file has found so far."""

    prompts: list[Prompt] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    overlong: list[str] = field(default_factory=list)
    without_completion: list[str] = field(default_factory=list)
    ignored_keys: set[str] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)


def load_prompts(
    path: Path | str,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    overlong: Literal["drop", "error"],
    max_bad_rows: int,
    require_completions: bool,
    max_completion_length: int | None = None,
) -> PromptSet:
    """Read and encode a prompt file, line by line.

    Args:
        path: JSON-lines file in UTF-8; blank lines are allowed.
        tokenizer: Encodes the rows: text with the tokenizer's default special tokens, chat messages through its
            template, completions without special tokens but with an end-of-sequence token at their end.
        max_prompt_length: Tokens of the longest prompt that is kept.
        overlong: ``drop`` counts and leaves out longer rows, ``error`` refuses the file.
        max_bad_rows: More bad rows than this refuse the file.
        require_completions: Every kept row needs a completion (gkd.lmbda below 1 takes them from here).
        max_completion_length: Tokens of the longest completion that is kept, end-of-sequence token included;
            ``None`` keeps all. Nothing is ever cut.

    Raises:
        DataError: Names file and lines of what is wrong, and what to change.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data.prompts: {path} is not a file")
    tally = _Tally()
    tally.digest.update(tokenizer_fingerprint(tokenizer).encode())
    for number, line in read_lines(path):
        try:
            prompt = _read_row(number, line, tokenizer, tally)
        except BadRow as error:
            tally.bad.append(f"{path}:{number}: {error}")
            log.info("Bad row %s", tally.bad[-1])
            if len(tally.bad) >= max_bad_rows + NUM_NAMED_ROWS:
                break  # enough to name; the rest of a wrong file need not be read
            continue
        reason = _overlong_reason(prompt, max_prompt_length, max_completion_length)
        if reason is not None:
            tally.overlong.append(f"{path}:{number}: {reason}")
            continue
        if prompt.completion_ids is None:
            tally.without_completion.append(f"{path}:{number}")
        tally.prompts.append(prompt)
        tally.digest.update(f"\n{number}:{len(line)}:".encode() + line)
    _refuse(path, tally, max_bad_rows, overlong, require_completions)
    return PromptSet(
        prompts=tuple(tally.prompts),
        path=path,
        fingerprint=tally.digest.hexdigest(),
        bad_rows=tuple(tally.bad),
        overlong_rows=tuple(tally.overlong),
        ignored_keys=tuple(sorted(tally.ignored_keys)),
    )


def _refuse(path: Path, tally: _Tally, max_bad_rows: int, overlong: str, require_completions: bool) -> None:
    if len(tally.bad) > max_bad_rows:
        raise DataError(
            f"{path} has more than data.max_bad_rows={max_bad_rows} bad rows; correct them or raise the limit. "
            f"{_name_first(tally.bad)}"
        )
    if overlong == "error" and tally.overlong:
        raise DataError(
            f"{path} has {len(tally.overlong)} overlong rows; raise the limit or set data.overlong_prompts: drop. "
            f"{_name_first(tally.overlong)}"
        )
    if not tally.prompts:
        raise DataError(
            f"{path} has no usable prompt ({len(tally.bad)} bad, {len(tally.overlong)} overlong rows). "
            f"{_name_first(tally.bad + tally.overlong)}"
        )
    if require_completions and tally.without_completion:
        raise DataError(
            f"{path} has {len(tally.without_completion)} rows without completion, which gkd.lmbda below 1 needs; add "
            f"them or set gkd.lmbda: 1. {_name_first(tally.without_completion)}"
        )


def _name_first(rows: list[str]) -> str:
    return "First rows:" + "".join(f"\n  {row}" for row in rows[:NUM_NAMED_ROWS]) if rows else ""


def _read_row(number: int, line: bytes, tokenizer: Tokenizer, tally: _Tally) -> Prompt:
    row = parse_row(line)
    text, ids = encode_prompt(row.get("prompt"), tokenizer)
    completion_ids = encode_completion(row.get("completion"), tokenizer)
    tally.ignored_keys.update(row.keys() - {"prompt", "completion"})
    return Prompt(row=number - 1, ids=ids, completion_ids=completion_ids, text=text)


def _overlong_reason(prompt: Prompt, max_prompt_length: int, max_completion_length: int | None) -> str | None:
    if len(prompt.ids) > max_prompt_length:
        return f"prompt has {len(prompt.ids)} tokens, more than data.max_prompt_length={max_prompt_length}"
    num_completion = len(prompt.completion_ids or ())
    if max_completion_length is not None and num_completion > max_completion_length:
        return f"completion has {num_completion} tokens, more than rollout.max_new_tokens={max_completion_length}"
    return None


class PromptLoader:
    """Endless stream of prompts, epoch after epoch.

    The order of an epoch depends on seed and epoch alone: the rows are sorted by a hash of (seed, epoch, index), which
    no platform and no library version changes.
    """

    def __init__(self, prompts: PromptSet, *, seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0  # prompts of this epoch already given out
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Full passes over the prompts that are behind us."""
        return self._epoch

    @property
    def num_prompts(self) -> int:
        """Prompts of one pass."""
        return len(self._prompts.prompts)

    def first_prompts(self, n: int) -> list[Prompt]:
        """Up to ``n`` prompts from the start of the file; does not advance."""
        return list(self._prompts.prompts[:n])

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; may cross into the next epochs."""
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
        indices = range(len(self._prompts.prompts))
        if not self._shuffle:
            return list(indices)
        keys = [
            hashlib.blake2b(f"{self._seed}/{epoch}/{index}".encode(), digest_size=16).digest()
            for index in indices
        ]
        return sorted(indices, key=keys.__getitem__)

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self._prompts.fingerprint, "seed": self._seed, "shuffle": self._shuffle}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly behind the last prompt that was taken before ``state_dict``.

        Raises:
            DataError: The state belongs to other prompts, another seed or another order.
        """
        keys = {"fingerprint": "data.prompts", "seed": "train.seed", "shuffle": "data.shuffle"}
        for name, value in self._identity().items():
            if state[name] != value:
                raise DataError(
                    f"the checkpoint was written with {name} {state[name]!r} of the prompts, this run has {value!r} "
                    f"({self._prompts.path}); set {keys[name]} back, or start in a new train.output_dir"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)
