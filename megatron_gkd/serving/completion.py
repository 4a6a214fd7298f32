"""How to sample, and what came back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Distribution to sample from, and when to stop.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Smallest set of tokens with at least this probability is kept, in (0, 1].
        top_k: Number of most likely tokens kept; -1 keeps all.
        max_new_tokens: Longest completion in tokens, at least 1.
        stop_token_ids: Tokens that end a completion, the end-of-sequence tokens among them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature={self.temperature} is not a finite number >= 0")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} is not in (0, 1]")
        if self.top_k != -1 and self.top_k < 1:
            problems.append(f"top_k={self.top_k} is neither -1 (all) nor >= 1")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens} is not >= 1")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    Attributes:
        ids: Token ids; ends with the token that stopped it, when one did, and holds nothing after it.
        finish_reason: ``stop`` or ``length``.
        weight_version: Version of the weights that made it; -1 if the server's has another form than a number.
    """

    ids: tuple[int, ...]
    finish_reason: str
    weight_version: int

    def to_json(self) -> list[Any]:
        """Plain values, for a broadcast without pickle."""
        return [list(self.ids), self.finish_reason, self.weight_version]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Completion":
        """Inverse of ``to_json``."""
        ids, finish_reason, weight_version = value
        return cls(tuple(ids), finish_reason, weight_version)
