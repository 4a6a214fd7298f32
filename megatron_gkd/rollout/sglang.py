"""Rollouts by SGLang servers: rank 0 talks to them, every rank gets the result."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_gkd.rollout.stop import cut_at_stop
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.completion import Completion, Sampling
from megatron_gkd.serving.errors import error_from_json, error_to_json


class SglangRollout:
    """A ``RolloutEngine`` over one or more servers; each gets a contiguous block of the prompts in one request.

    Args:
        clients: One per server. Only the leader's are used; other ranks may pass none.
        sampling: Distribution, limits and stop tokens (the end-of-sequence tokens among them).
        stop: Texts that end a completion; the ids are cut after generation.
        decode: Text of token ids; needed with ``stop``.
        is_leader: Whether this rank talks to the servers; exactly one does.
        broadcast: Gives the leader's JSON-able value to all ranks; the others' argument is ignored.
        push: Brings the student's weights to the servers as a version; collective, see ``rollout.sync``.
    """

    def __init__(
        self,
        clients: Sequence[SglangClient],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        is_leader: bool,
        broadcast: Callable[[Any], Any],
        push: Callable[[int], None],
    ):
        if is_leader and not clients:
            raise ValueError("the leader needs the client of at least one server")
        if stop and decode is None:
            raise ValueError("stop strings need a decode function")
        if "" in stop:
            raise ValueError("an empty stop string would end every completion at once")
        self._clients, self._sampling, self._stop = tuple(clients), sampling, tuple(stop)
        self._decode = decode
        self._is_leader, self._broadcast, self._push = is_leader, broadcast, push

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """See ``RolloutEngine.generate``."""
        if len(seeds) != len(prompts) or len(set(seeds)) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts need as many different seeds, got {len(set(seeds))} of {len(seeds)}"
            )
        return [
            Completion.from_json(value) for value in self._on_leader(lambda: self._generate(prompts, seeds))
        ]

    def push_weights(self, version: int) -> None:
        """See ``RolloutEngine.push_weights``."""
        self._push(version)

    def close(self) -> None:
        """Nothing is held; who started the servers stops them."""

    def _on_leader(self, work: Callable[[], list[Any]]) -> list[Any]:
        """The leader's result on all ranks, or its error on all ranks: nobody is left waiting in the broadcast."""
        outcome: dict[str, Any] | None = None
        failure: Exception | None = None
        if self._is_leader:
            try:
                outcome = {"value": work()}
            except Exception as error:  # of any kind: the other ranks already wait for the outcome
                failure = error
                outcome = {"error": error_to_json(error)}
        outcome = self._broadcast(outcome)
        assert outcome is not None
        if "error" in outcome:
            raise error_from_json(outcome["error"]) from failure
        return outcome["value"]

    def _generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Any]:
        blocks = _split(len(prompts), len(self._clients))

        def ask(client: SglangClient, block: slice) -> list[Completion]:
            return client.generate(prompts[block], seeds=seeds[block], sampling=self._sampling)

        with ThreadPoolExecutor(max_workers=len(self._clients)) as threads:
            results = list(threads.map(ask, self._clients, blocks))
        return [self._cut(completion).to_json() for result in results for completion in result]

    def _cut(self, completion: Completion) -> Completion:
        return completion if self._decode is None else cut_at_stop(completion, self._stop, self._decode)


def _split(num_items: int, num_blocks: int) -> list[slice]:
    """Contiguous blocks whose sizes differ by one at most, the larger ones first."""
    size, num_larger = divmod(num_items, num_blocks)
    edges = [block * size + min(block, num_larger) for block in range(num_blocks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]
