"""What a rollout engine is: something that samples completions from the student's newest weights."""

from collections.abc import Sequence
from typing import Protocol

from megatron_gkd.serving.completion import Completion, Sampling
from megatron_gkd.serving.errors import (
    EngineDied,
    EngineError,
    EngineReplyInvalid,
    EngineRequestInvalid,
    EngineTimeout,
    StaleWeights,
)

__all__ = [
    "Completion",
    "EngineDied",
    "EngineError",
    "EngineReplyInvalid",
    "EngineRequestInvalid",
    "EngineTimeout",
    "RolloutEngine",
    "Sampling",
    "StaleWeights",
]


class RolloutEngine(Protocol):
    """Samples from the student. All methods are collective: every training rank calls them with equal arguments."""

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """One completion per prompt, in order, equal on all ranks.

        Args:
            prompts: Token ids, each list non-empty.
            seeds: One per prompt, all different, in [0, 2**63); with the same weights and the same arguments the same
                ids come back.

        Raises:
            EngineError: On all ranks alike.
        """
        ...

    def push_weights(self, version: int) -> None:
        """Make the student's present weights, numbered ``version``, the ones that generate.

        Raises:
            EngineError: On all ranks alike; the engine must not be used any more.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
