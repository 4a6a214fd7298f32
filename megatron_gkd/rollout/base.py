"""The interface of a rollout engine, what one is built from, and stop strings."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from megatron_gkd.config import GkdConfig, load_hf_shapes
from megatron_gkd.data.tokenizer import Tokenizer
from megatron_gkd.models.gpt import ShardedModel
from megatron_gkd.parallel.groups import Job
from megatron_gkd.serving.protocol import Completion, Sampling


@dataclass(frozen=True)
class RolloutContext:
    """What a rollout engine is checked against and built from, besides its own section.

    Attributes:
        config: The whole configuration.
        job: This process.
        tokenizer: The student's.
    """

    config: GkdConfig
    job: Job
    tokenizer: Tokenizer

    @property
    def sampling(self) -> Sampling:
        """Distribution, limits and stop tokens from the rollout section."""
        section = self.config.rollout
        return Sampling(
            section.temperature,
            section.top_p,
            section.top_k,
            section.max_new_tokens,
            self.tokenizer.eos_ids,
        )

    @property
    def vocab_size(self) -> int:
        """Entries of the student's vocabulary, without padding."""
        return load_hf_shapes(self.config.student.hf_folder).vocab_size


@dataclass(frozen=True)
class PushReport:
    """Size of a weight push, and the outcome of its probe.

    Attributes:
        num_bytes: Bytes written by all ranks together.
        max_difference: Largest difference in log-probability between server and trainer over the probe, in nats.
        num_probe_tokens: Tokens compared.
    """

    num_bytes: int
    max_difference: float
    num_probe_tokens: int


class RolloutEngine(Protocol):
    """Samples completions from the student's current weights.

    An engine is built before the models, connected once the student exists, and closed at the end of the run.
    ``connect``, ``generate`` and ``push_weights`` are collective: every rank calls them with equal arguments.
    """

    @classmethod
    def preflight(cls, section: Any, context: RolloutContext) -> None:
        """Check that the engine can work on this machine; runs before the process group exists.

        Args:
            section: The rollout section of this kind.
            context: The rest of the run.

        Raises:
            ConfigError: Lists all problems.
        """

    @classmethod
    def build(cls, section: Any, context: RolloutContext) -> Self:
        """The engine of a section; starts a server that the run owns, and does not wait for it."""
        ...

    def connect(self, student: ShardedModel) -> None:
        """Attach the engine to the student; waits for its servers.

        Raises:
            EngineError: On all ranks alike.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """One completion per prompt, in order, equal on all ranks.

        Args:
            prompts: Token ids, each list non-empty.
            seeds: One per prompt, all different, in [0, 2**63). Equal weights, prompts and seeds give equal ids.

        Raises:
            EngineError: On all ranks alike.
        """
        ...

    def push_weights(self, version: int, probe: Sequence[Sequence[int]]) -> PushReport | None:
        """Load the student's current weights into the engine as ``version``.

        Args:
            version: Finished iterations.
            probe: Token ids of some sequences. A part of them is scored by engine and trainer, to verify the push.

        Returns:
            Size and probe of the push; ``None`` where nothing is copied.

        Raises:
            EngineError: On all ranks alike; the engine must not be used afterwards.
        """
        ...

    def close(self) -> None:
        """Stop what the engine started and remove its files; harmless when called twice."""


def cut_at_stop(
    completion: Completion, stop: Sequence[str], decode: Callable[[list[int]], str]
) -> Completion:
    """The completion up to the first token that completes a stop string; itself without one.

    The cut is made here because a server would need a tokenizer of its own, which may differ. A stop string may start
    and end inside tokens, so the text of the last token can extend beyond it.

    Args:
        completion: As generated.
        stop: Non-empty strings.
        decode: Text of token ids. More tokens must only append text, as in every detokenizer up to unfinished characters.
    """
    ids = list(completion.ids)

    def has_stop(num_tokens: int) -> bool:
        text = decode(ids[:num_tokens])
        return any(string in text for string in stop)

    if not stop or not has_stop(len(ids)):
        return completion
    num_kept = bisect.bisect_left(range(len(ids) + 1), True, key=has_stop)
    return replace(completion, ids=completion.ids[:num_kept], finish_reason="stop")
