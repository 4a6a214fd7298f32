"""Endless streams of prompts over a set in memory, and their mixture by weight; exact to continue after a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_gkd.data.prompts import PromptSet
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.tokenizer import DataError


class PromptsChanged(DataError):
    """The prompts, or their order, are not those of the checkpoint; ``keys`` are the configuration keys behind it."""

    def __init__(self, message: str, keys: tuple[str, ...]):
        super().__init__(message)
        self.keys = keys


class PromptStream(Protocol):
    """Prompts, pass after pass over the files."""

    @property
    def prompts_per_pass(self) -> int | None:
        """Prompts of one pass over the files; ``None`` where nobody has counted them."""
        ...

    def first_prompts(self, n: int) -> list[Prompt]:
        """Up to ``n`` prompts from the start of the files; does not advance."""
        ...

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts; may cross into the next passes."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly behind the last prompt that was taken before ``state_dict``.

        Raises:
            PromptsChanged: The state belongs to other prompts, another seed or another order; nothing was changed.
        """
        ...


class PromptLoader:
    """A ``PromptStream`` over prompts in memory.

    Args:
        prompts: All of them.
        seed: The order of a pass depends on seed and pass alone.
        shuffle: False keeps the order of the files.
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
    def prompts_per_pass(self) -> int:
        """See ``PromptStream``."""
        return len(self._prompts.prompts)

    def first_prompts(self, n: int) -> list[Prompt]:
        """See ``PromptStream``."""
        return list(self._prompts.prompts[:n])

    def take(self, n: int) -> list[Prompt]:
        """See ``PromptStream``."""
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

    def state_dict(self) -> dict[str, Any]:
        """See ``PromptStream``."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``PromptStream``."""
        require_same(state, self._identity(), self._prompts.name)
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._order_of(self._epoch)


class MixedPrompts:
    """A ``PromptStream`` that takes from several others by weight.

    The next prompt comes from the stream that is furthest behind its share, so that after any number of prompts each
    share is as exact as it can be; nothing is drawn.

    Args:
        streams: One per file.
        weights: One per stream, above 0.
    """

    def __init__(self, streams: Sequence[PromptStream], weights: Sequence[float]) -> None:
        self._streams, self._weights = tuple(streams), tuple(weights)
        self._taken = [0] * len(streams)

    @property
    def prompts_per_pass(self) -> None:
        """See ``PromptStream``; the files are not passed over together."""
        return

    def first_prompts(self, n: int) -> list[Prompt]:
        """See ``PromptStream``."""
        return [prompt for stream in self._streams for prompt in stream.first_prompts(n)][:n]

    def take(self, n: int) -> list[Prompt]:
        """See ``PromptStream``."""
        return [self._take_one() for _ in range(n)]

    def _take_one(self) -> Prompt:
        total, num = sum(self._weights), sum(self._taken) + 1
        behind = [w * num / total - taken for w, taken in zip(self._weights, self._taken, strict=True)]
        index = behind.index(max(behind))
        self._taken[index] += 1
        return self._streams[index].take(1)[0]

    def state_dict(self) -> dict[str, Any]:
        """See ``PromptStream``."""
        return {
            "weights": list(self._weights),
            "taken": list(self._taken),
            "streams": [stream.state_dict() for stream in self._streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``PromptStream``."""
        require_same(state, {"weights": list(self._weights)}, "data.prompts")
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
    """0 .. size - 1 sorted by a hash of key and index, which no platform and no library version changes."""
    keys = [hashlib.blake2b(f"{key}/{index}".encode(), digest_size=16).digest() for index in range(size)]
    return sorted(range(size), key=keys.__getitem__)


_SETTINGS = {
    "fingerprint": "data.prompts",
    "seed": "train.seed",
    "shuffle": "data.shuffle",
    "shuffle_rows": "data.shuffle_rows",
    "weights": "data.weights",
}
"""Which key of the configuration a part of a stream's identity comes from."""


def require_same(state: Mapping[str, Any], identity: Mapping[str, Any], name: str) -> None:
    """Refuse the state of another stream.

    Raises:
        PromptsChanged: Names what differs, both values, and the keys to set back.
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
        f"the checkpoint was written for other prompts than {name}: {values}; set {', '.join(keys)} back, or read these "
        f"from their beginning with checkpoint.allow_changes=[{','.join(keys)}]",
        keys,
    )
