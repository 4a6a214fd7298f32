"""Batched sampling from a GPTModel with a KV cache, under tensor and pipeline parallelism.

All sequences advance together: one prefill pass over the length of the shortest prompt, then one position per pass. A
sequence with a longer prompt takes its next prompt token at that position instead of a sampled one.

Shapes: B = sequences, S = positions of one pass, V = vocabulary entries, H = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_gkd.models.gpt import HiddenTap, LocalModel
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.seeded_sampling import sample_with_seed


@dataclass(frozen=True)
class SamplingRule:
    """Sampling parameters.

    Attributes:
        temperature: Divides the logits, above 0.
        top_p: Keeps the smallest set of tokens with at least this total probability, in (0, 1].
        top_k: Number of most likely tokens kept; -1 keeps all.
        max_new_tokens: Maximum length of a completion.
        stop_token_ids: Each of these ends a completion.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@torch.no_grad()
def generate(
    model: LocalModel,
    groups: ModelGroups,
    tap: HiddenTap | None,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    rule: SamplingRule,
    *,
    vocab_size: int,
) -> list[list[int]]:
    """Sample a completion of each prompt. Collective over the ranks of one model replica.

    Up to rounding, a completion is independent of the other prompts in the batch: the noise of a token is a function of
    its sequence's seed and its position.

    Args:
        model: This rank's part of the model, with its output layer.
        groups: Its layout and process groups.
        tap: The ``HiddenTap`` on the last stage, if installed.
        prompts: Non-empty token ids, the same on all ranks.
        seeds: One per prompt.
        rule: Sampling parameters.
        vocab_size: Vocabulary size without padding; padding is never sampled.

    Returns:
        Token ids of each completion including the stop token, the same on all ranks.
    """
    was_training = model.training
    model.eval()
    try:
        if tap is None:
            return _generate(model, groups, prompts, seeds, rule, vocab_size)
        with tap:
            return _generate(model, groups, prompts, seeds, rule, vocab_size)
    finally:
        model.train(was_training)


def _generate(
    model, groups: ModelGroups, prompts, seeds, rule: SamplingRule, vocab_size: int
) -> list[list[int]]:
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    end = max(lengths) + rule.max_new_tokens
    tokens_BS = torch.zeros(len(prompts), end, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = torch.tensor(prompt, device=device)
    length_B = torch.tensor(lengths, device=device)
    seed_B = torch.tensor(seeds, dtype=torch.int64, device=device)
    stop_ids = torch.tensor(rule.stop_token_ids, dtype=torch.long, device=device)
    # length of a completed sequence's completion, 0 for those still open
    completed_B = torch.zeros(len(prompts), dtype=torch.long, device=device)
    stages = _Stages(model, groups, len(prompts), end)
    start = 0
    for position in range(min(lengths), end):
        logits_BV = stages.forward(tokens_BS[:, start:position], start)
        drawn_B = None if logits_BV is None else _draw(logits_BV[:, :vocab_size], seed_B, position, rule)
        chosen_B = stages.broadcast(drawn_B)
        is_open_B = (length_B <= position) & (completed_B == 0)
        tokens_BS[:, position] = torch.where(is_open_B, chosen_B, tokens_BS[:, position])
        num_new_B = position + 1 - length_B
        ends_B = is_open_B & (torch.isin(chosen_B, stop_ids) | (num_new_B >= rule.max_new_tokens))
        completed_B = torch.where(ends_B, num_new_B, completed_B)
        # every stage sees the same broadcast tokens, so all ranks leave the loop together
        if bool((completed_B > 0).all()):
            break
        start = position
    return [
        tokens_BS[row, length : length + int(completed_B[row])].tolist() for row, length in enumerate(lengths)
    ]


class _Stages:
    """Decode passes through the pipeline stages with a KV cache."""

    def __init__(self, model, groups: ModelGroups, num_sequences: int, max_length: int):
        self._model, self._groups, self._num_sequences = model, groups, num_sequences
        self._context = StaticInferenceContext(num_sequences, max_length)
        self._p2p = P2PCommunicator(groups.pg.pp, model.config) if groups.layout.pp_size > 1 else None

    def forward(self, ids_BS: Tensor, start: int) -> Tensor | None:
        """Return [B, V] logits of the last position on the last stage, ``None`` elsewhere."""
        num_positions = ids_BS.shape[1]
        position_ids_BS = torch.arange(start, start + num_positions, device=ids_BS.device).expand_as(ids_BS)
        if self._p2p is not None:
            shape = (num_positions, self._num_sequences, self._model.config.hidden_size)
            self._model.set_input_tensor(self._p2p.recv_forward(shape, self._groups.is_first_stage))
        # prefill: the model applies its causal mask; decode: one query attends to all cached positions, none is masked
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ids_BS.device) if start else None
        output = self._model(
            ids_BS, position_ids_BS, mask, inference_context=self._context, runtime_gather_output=True
        )
        if self._p2p is not None:
            self._p2p.send_forward(output, self._groups.is_last_stage)  # a no-op on the last stage
        self._context.increment_sequence_len_offset(num_positions)
        # every pass after the first decodes one token; enabling the mode again is a no-op
        self._context.enable_decode_mode()
        return output[:, -1] if self._groups.is_last_stage else None

    def broadcast(self, drawn_B: Tensor | None) -> Tensor:
        """Return the last stage's [B] tokens on every stage."""
        chosen_B = drawn_B
        if chosen_B is None:
            device = next(self._model.parameters()).device
            chosen_B = torch.empty(self._num_sequences, dtype=torch.long, device=device)
        if self._p2p is not None:
            group = self._groups.pg.pp
            dist.broadcast(chosen_B, dist.get_global_rank(group, group.size() - 1), group=group)
        return chosen_B


def _draw(logits_BV: Tensor, seed_B: Tensor, position: int, rule: SamplingRule) -> Tensor:
    log_probs_BV = (logits_BV.float() / rule.temperature).log_softmax(-1)
    # top-k before top-p, as SGLang and transformers do: top-p counts the mass of what top-k has kept
    if 0 < rule.top_k < log_probs_BV.shape[-1]:
        least_B1 = log_probs_BV.topk(rule.top_k).values[:, -1:]
        log_probs_BV = log_probs_BV.masked_fill(log_probs_BV < least_B1, -torch.inf)
    if rule.top_p < 1:
        log_probs_BV = _keep_top_p(log_probs_BV.log_softmax(-1), rule.top_p)
    return sample_with_seed(log_probs_BV, seed_B, torch.full_like(seed_B, position))[:, 0]


def _keep_top_p(log_probs_BV: Tensor, top_p: float) -> Tensor:
    ordered_BV, order_BV = log_probs_BV.sort(dim=-1, descending=True)
    mass_before_BV = ordered_BV.exp().cumsum(-1) - ordered_BV.exp()
    dropped_BV = torch.zeros_like(mass_before_BV, dtype=torch.bool).scatter_(
        -1, order_BV, mass_before_BV >= top_p
    )
    return log_probs_BV.masked_fill(dropped_BV, -torch.inf)
