"""The embedded engine: the student generates with its own Megatron model; no server, and no weights to push."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_gkd.models.chunks import LocalModel
from megatron_gkd.models.generation import SamplingRule, generate
from megatron_gkd.models.gpt import HiddenTap
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.parallel.routing import share
from megatron_gkd.rollout.engine import Completion, Sampling
from megatron_gkd.rollout.stop import cut_at_stop


class MegatronRollout:
    """A ``RolloutEngine`` over the student itself; every copy of the student generates its share.

    Args:
        model: This rank's part of the student.
        groups: Its layout and groups.
        tap: Switch on its output layer, on the last stage.
        sampling: How to draw tokens.
        vocab_size: Real vocabulary entries.
        stop: Texts that end a completion; the ids are cut after generation.
        decode: Text of token ids.
    """

    def __init__(
        self,
        model: LocalModel,
        groups: ModelGroups,
        tap: HiddenTap | None,
        sampling: Sampling,
        *,
        vocab_size: int,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str],
    ):
        self._model, self._groups, self._tap = model, groups, tap
        self._vocab_size, self._version = vocab_size, 0
        self._stop, self._decode = tuple(stop), decode
        self._rule = SamplingRule(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.max_new_tokens,
            sampling.stop_token_ids,
        )

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """See ``RolloutEngine.generate``."""
        num_copies = self._groups.layout.dp_size
        padded = -(-len(prompts) // num_copies) * num_copies
        start, stop = (min(edge, len(prompts)) for edge in share(padded, self._groups.dp_rank, num_copies))
        device = next(self._model.parameters()).device
        # -1 marks what this copy does not know; the maximum over all ranks is the whole table
        table = torch.full((len(prompts), self._rule.max_new_tokens), -1, dtype=torch.long, device=device)
        if start < stop:
            completions = generate(
                self._model,
                self._groups,
                self._tap,
                prompts[start:stop],
                seeds[start:stop],
                self._rule,
                vocab_size=self._vocab_size,
            )
            for row, ids in enumerate(completions, start):
                table[row, : len(ids)] = torch.tensor(ids, device=device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        return [self._completion([i for i in ids if i >= 0]) for ids in table.tolist()]

    def push_weights(self, version: int) -> None:
        """The student's weights are already here; only their version is noted."""
        self._version = version

    def close(self) -> None:
        """Nothing is held."""

    def _completion(self, ids: list[int]) -> Completion:
        reason = "stop" if ids[-1] in self._rule.stop_token_ids else "length"
        return cut_at_stop(Completion(tuple(ids), reason, self._version), self._stop, self._decode)
