"""The embedded engine: the student's own Megatron model generates, without a server or a weight push."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from typing_extensions import override

from megatron_gkd.config.rollout import MegatronRolloutConfig
from megatron_gkd.models.generation import SamplingRule, generate
from megatron_gkd.models.gpt import ShardedModel
from megatron_gkd.parallel.routing import share
from megatron_gkd.rollout.base import RolloutContext, RolloutEngine, cut_at_stop
from megatron_gkd.serving.protocol import Completion, Sampling


class MegatronRollout(RolloutEngine):
    """Generation by the student itself; each copy of the student generates its share of the prompts.

    Args:
        sampling: Distribution, limits and stop tokens.
        stop: Strings that end a completion; the ids are cut after generation.
        decode: Text of token ids.
    """

    def __init__(self, sampling: Sampling, *, stop: Sequence[str] = (), decode: Callable[[list[int]], str]):
        self._stop, self._decode = tuple(stop), decode
        self._version = 0
        self._student: ShardedModel | None = None
        self._rule = SamplingRule(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.max_new_tokens,
            sampling.stop_token_ids,
        )

    @override
    @classmethod
    def build(cls, section: MegatronRolloutConfig, context: RolloutContext) -> "MegatronRollout":
        return cls(context.sampling, stop=section.stop, decode=context.tokenizer.decode)

    @override
    def connect(self, student: ShardedModel) -> None:
        self._student = student

    @override
    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        student = self._student
        assert student is not None  # connected
        groups, model = student.groups, student.model
        num_copies = groups.layout.dp_size
        # shares are equal and the last ones may be short or empty
        padded = -(-len(prompts) // num_copies) * num_copies
        start, stop = (min(edge, len(prompts)) for edge in share(padded, groups.dp_rank, num_copies))
        device = next(model.parameters()).device
        # -1 marks the rows of other copies: the maximum over all ranks is the whole table
        table = torch.full((len(prompts), self._rule.max_new_tokens), -1, dtype=torch.long, device=device)
        if start < stop:
            completions = generate(
                model,
                groups,
                student.tap,
                prompts[start:stop],
                seeds[start:stop],
                self._rule,
                vocab_size=student.shapes.vocab_size,
            )
            for row, ids in enumerate(completions, start):
                table[row, : len(ids)] = torch.tensor(ids, device=device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        return [self._completion([i for i in ids if i >= 0]) for ids in table.tolist()]

    @override
    def push_weights(self, version: int, probe: Sequence[Sequence[int]]) -> None:
        self._version = version  # the student generates with its own weights

    def _completion(self, ids: list[int]) -> Completion:
        reason = "stop" if ids[-1] in self._rule.stop_token_ids else "length"
        return cut_at_stop(Completion(tuple(ids), reason, self._version), self._stop, self._decode)
