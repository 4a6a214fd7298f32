"""From SGLang's answers to checked values: whatever breaks the contract is an error, never a guess."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_gkd.serving.completion import Completion, Sampling
from megatron_gkd.serving.errors import EngineReplyInvalid, StaleWeights

WeightVersion = int | str
"""The trainer counts its pushes; a server that was started by somebody else may call its weights by any name."""


def parse_completions(
    reply: Any,
    *,
    num_prompts: int,
    sampling: Sampling,
    vocab_size: int,
    expected_version: WeightVersion | None,
) -> list[Completion]:
    """Completions in the order of the prompts.

    Args:
        reply: Decoded answer of ``/generate`` to a list of prompts.
        num_prompts: Number of prompts that were sent.
        sampling: What was asked for.
        vocab_size: Ids must lie below.
        expected_version: Version of the weights that must have made every token; None accepts any one or several.

    Raises:
        EngineReplyInvalid: The answer breaks the contract.
        StaleWeights: Another version made a completion, or part of it.
    """
    return [
        _parse_completion(index, entry, sampling, vocab_size, expected_version)
        for index, entry in enumerate(entries_of(reply, num_prompts))
    ]


def parse_prompt_logprobs(
    reply: Any, *, sequences: Sequence[Sequence[int]], vocab_size: int, expected_version: WeightVersion | None
) -> list[tuple[float, ...]]:
    """Log-probabilities of the second to the last token of each sequence, in nats.

    Args:
        reply: Decoded answer of ``/generate`` with ``return_logprob``, ``logprob_start_len: 0`` and no new tokens.
        sequences: Token ids that were sent.
        vocab_size: Rows of the served model's embedding.
        expected_version: As in ``parse_completions``.

    Raises:
        EngineReplyInvalid: The answer breaks the contract.
        StaleWeights: Another version scored a sequence.
    """
    scores = []
    for index, (entry, ids) in enumerate(zip(entries_of(reply, len(sequences)), sequences, strict=True)):
        meta = meta_info(index, entry)
        check_version(index, meta, expected_version)
        scores.append(parse_token_log_probs(index, meta, ids, vocab_size))
    return scores


def parse_token_log_probs(
    index: int, meta: dict[str, Any], ids: Sequence[int], vocab_size: int
) -> tuple[float, ...]:
    """Log-probabilities in nats of the second to the last of ``ids``, which must be those that the answer scores.

    Args:
        index: Of the answer, for messages.
        meta: Its ``meta_info``.
        ids: Token ids from ``logprob_start_len`` on.
        vocab_size: Rows of the served model's embedding.

    Raises:
        EngineReplyInvalid: Other ids, or values that are not finite numbers.
    """
    rows = meta.get("input_token_logprobs")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) >= 2 for row in rows):
        raise EngineReplyInvalid(f"answer {index} has no list of input_token_logprobs: {str(rows)[:200]}")
    # the server writes 0 for the last id of the vocabulary (it takes it for the hash of an image)
    if [row[1] for row in rows] != [token_id if token_id < vocab_size - 1 else 0 for token_id in ids]:
        raise EngineReplyInvalid(
            f"answer {index} scores other ids than were sent: {[row[1] for row in rows][:20]}"
        )
    values = [row[0] for row in rows[1:]]
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
        raise EngineReplyInvalid(f"answer {index} has a log-prob that is not a finite number: {values[:20]}")
    return tuple(float(value) for value in values)


def check_success(reply: Any, action: str) -> None:
    """Raises ``EngineReplyInvalid`` unless the answer to a weight request says that it succeeded."""
    if not isinstance(reply, dict) or reply.get("success") is not True:
        raise EngineReplyInvalid(f"{action} did not succeed: {str(reply)[:500]}")


def entries_of(reply: Any, num_expected: int) -> list[Any]:
    """The answers to ``num_expected`` prompts; raises ``EngineReplyInvalid`` if there are more or fewer."""
    if not isinstance(reply, list) or len(reply) != num_expected:
        what = (
            f"{len(reply)} answers"
            if isinstance(reply, list)
            else f"{type(reply).__name__} {str(reply)[:200]}"
        )
        raise EngineReplyInvalid(f"sent {num_expected} prompts, received {what}")
    return reply


def meta_info(index: int, entry: Any) -> dict[str, Any]:
    """``meta_info`` of an answer; raises ``EngineReplyInvalid`` if it has none or was aborted."""
    meta = entry.get("meta_info") if isinstance(entry, dict) else None
    if not isinstance(meta, dict):
        raise EngineReplyInvalid(f"answer {index} has no meta_info: {str(entry)[:200]}")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise EngineReplyInvalid(f"the server aborted prompt {index}: {reason.get('message')}")
    return meta


def _parse_completion(
    index: int, entry: Any, sampling: Sampling, vocab_size: int, expected_version: WeightVersion | None
) -> Completion:
    meta = meta_info(index, entry)
    version = check_version(index, meta, expected_version)
    ids = entry.get("output_ids")
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise EngineReplyInvalid(f"answer {index} has output_ids outside [0, {vocab_size}): {str(ids)[:200]}")
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind == "stop" and isinstance(reason, dict):
        _check_stopped(index, ids, reason.get("matched"), sampling.stop_token_ids)
    elif kind == "length":
        _check_full_length(index, ids, sampling)
    else:
        raise EngineReplyInvalid(f"answer {index} has finish_reason {reason}, expected type stop or length")
    if len(ids) > sampling.max_new_tokens:
        raise EngineReplyInvalid(
            f"answer {index} has {len(ids)} tokens, asked for {sampling.max_new_tokens} at most"
        )
    return Completion(tuple(ids), kind, version)


def _check_stopped(index: int, ids: list[int], matched: Any, stop_token_ids: Sequence[int]) -> None:
    """The stop token must be the last id, and the only one of its kind.

    sglang 0.5.23 returns it, with or without a tokenizer. It may also be one that only the server knows: it reads the
    end-of-sequence ids of the model's config.json and generation_config.json.
    """
    if type(matched) is not int:
        raise EngineReplyInvalid(f"answer {index} stopped at {matched!r}, which is not a token id")
    stops = {matched, *stop_token_ids}
    if not ids or ids[-1] != matched or stops & set(ids[:-1]):
        raise EngineReplyInvalid(
            f"answer {index} says it stopped at token {matched}, but its ids end with {ids[-20:]}"
        )


def _check_full_length(index: int, ids: list[int], sampling: Sampling) -> None:
    """SGLang shortens a request that does not fit its context without an error; it then reports ``length``."""
    if len(ids) != sampling.max_new_tokens:
        raise EngineReplyInvalid(
            f"answer {index} ended for its length after {len(ids)} of {sampling.max_new_tokens} tokens: the server's "
            "context length is too small for prompt + max_new_tokens"
        )
    if stopped := set(ids) & set(sampling.stop_token_ids):
        raise EngineReplyInvalid(f"answer {index} went on after stop token {min(stopped)}")


def check_version(index: int, meta: dict[str, Any], expected: WeightVersion | None) -> int:
    """Version of the weights behind an answer; the oldest if several are accepted, -1 if it is not a number.

    Raises:
        EngineReplyInvalid: The answer does not say.
        StaleWeights: Not ``expected`` alone.
    """
    spans = meta.get("weight_versions")
    if not isinstance(spans, list) or not spans or not all(isinstance(span, dict) for span in spans):
        raise EngineReplyInvalid(
            f"answer {index} does not say which weight_versions made it: {str(spans)[:200]}"
        )
    versions = [str(span.get("version")) for span in spans]
    if expected is not None and versions != [str(expected)]:
        raise StaleWeights(
            f"answer {index} was made by weight versions {versions}, expected only {expected}; push the weights before "
            "generating, and not while a request runs"
        )
    return min(int(version) if version.isdecimal() else -1 for version in versions)
