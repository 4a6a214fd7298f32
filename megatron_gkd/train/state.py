"""How far a run has come; stored with every checkpoint."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        iteration: Finished iterations.
        consumed_samples: Sequences trained on.
        consumed_tokens: Completion tokens trained on.
        on_policy_tokens: Those of them that the student wrote itself.
        skipped_updates: Iterations whose gradients were not finite, so that no update was made.
        skipped_in_a_row: How many of those came last, without a good one between.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    on_policy_tokens: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """Inverse of ``to_json``."""
        return cls(**value)
