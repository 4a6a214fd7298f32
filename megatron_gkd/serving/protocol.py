"""SGLang's HTTP contract: validated requests, parsed replies, no guesses in between."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_gkd.serving.errors import EngineReplyInvalid, EngineRequestInvalid, StaleWeights

# The trainer numbers its pushes; a server that it did not start may report any name.
WeightVersion = int | str


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a rollout.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_p: Nucleus sampling: smallest set of tokens with at least this probability, in (0, 1].
        top_k: Samples among the most likely tokens; -1 disables it.
        max_new_tokens: Maximum completion length in tokens, at least 1.
        stop_token_ids: Tokens that end a completion, including the end-of-sequence tokens.
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
    """One sampled completion.

    Attributes:
        ids: Token ids, including the stop token if there was one.
        finish_reason: ``stop`` or ``length``.
        weight_version: Version of the weights that generated it; -1 if the server's version is not a number.
    """

    ids: tuple[int, ...]
    finish_reason: str
    weight_version: int

    def to_json(self) -> list[Any]:
        """Return plain values, for a broadcast without pickle."""
        return [list(self.ids), self.finish_reason, self.weight_version]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Completion":
        """Inverse of ``to_json``."""
        ids, finish_reason, weight_version = value
        return cls(tuple(ids), finish_reason, weight_version)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Reject empty prompts and ids outside [0, vocab_size).

    Raises:
        EngineRequestInvalid: Names the prompt and the id.
    """
    # sglang 0.5.23 validates neither, and both kill the server (an id out of range by an IndexError in its scheduler).
    for index, ids in enumerate(prompts):
        if len(ids) == 0:
            raise EngineRequestInvalid(f"prompt {index} is empty; it would kill the server")
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise EngineRequestInvalid(
                    f"prompt {index} has token {token!r} outside [0, {vocab_size}); it would kill the server"
                )


def check_seeds(seeds: Sequence[int], num_prompts: int) -> None:
    """Require one distinct seed in [0, 2**63) per prompt.

    Raises:
        EngineRequestInvalid: Names what is wrong.
    """
    if len(seeds) != num_prompts:
        raise EngineRequestInvalid(f"{num_prompts} prompts need as many seeds, not {len(seeds)}")
    if bad := [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**63]:
        raise EngineRequestInvalid(f"seed {bad[0]!r} is not an integer in [0, 2**63)")
    # In deterministic mode a sample is a function of prompt, weights and seed.
    if len(set(seeds)) != len(seeds):
        raise EngineRequestInvalid("seeds repeat; two samples of one prompt would be identical")


def check_weight_files(folder: Path) -> None:
    """Check the headers of the safetensors files in ``folder`` against their sizes.

    Unknown names, missing tensors and other dtypes, which SGLang accepts silently, are the caller's responsibility.

    Raises:
        EngineRequestInvalid: The folder has no safetensors file, or one is damaged or empty.
    """
    # sglang 0.5.23 does not reject a truncated file: its scheduler crashes on it.
    if not folder.is_dir():
        raise EngineRequestInvalid(f"weight folder {folder} does not exist")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineRequestInvalid(f"weight folder {folder} holds no *.safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                is_empty = not list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise EngineRequestInvalid(f"{file} would kill the server: {error}") from error
        if is_empty:
            raise EngineRequestInvalid(f"{file} holds no tensor")


def parse_completions(
    reply: Any,
    *,
    num_prompts: int,
    sampling: Sampling,
    vocab_size: int,
    expected_version: WeightVersion,
) -> list[Completion]:
    """Parse the reply of ``/generate`` into one completion per prompt.

    Args:
        reply: Decoded JSON.
        num_prompts: Number of prompts sent.
        sampling: Sampling parameters sent.
        vocab_size: Upper bound of token ids.
        expected_version: Weight version that must have generated every token.

    Raises:
        EngineReplyInvalid: The reply violates the contract.
        StaleWeights: Another weight version generated a completion or part of it.
    """
    return [
        _parse_completion(index, entry, sampling, vocab_size, expected_version)
        for index, entry in enumerate(reply_entries(reply, num_prompts))
    ]


def parse_prompt_logprobs(
    reply: Any, *, sequences: Sequence[Sequence[int]], vocab_size: int, expected_version: WeightVersion
) -> list[tuple[float, ...]]:
    """Return the log-probabilities of each sequence from its second token on, in nats.

    Args:
        reply: Decoded reply of ``/generate`` with ``return_logprob``, ``logprob_start_len: 0`` and no new tokens.
        sequences: Token ids sent.
        vocab_size: Vocabulary size of the served model.
        expected_version: Weight version that must have scored every token.

    Raises:
        EngineReplyInvalid: The reply violates the contract.
        StaleWeights: Another weight version scored a sequence.
    """
    scores = []
    for index, (entry, ids) in enumerate(zip(reply_entries(reply, len(sequences)), sequences, strict=True)):
        meta = meta_info(index, entry)
        check_version(index, meta, expected_version)
        scores.append(parse_token_log_probs(index, meta, ids, vocab_size))
    return scores


def parse_token_log_probs(
    index: int, meta: dict[str, Any], ids: Sequence[int], vocab_size: int
) -> tuple[float, ...]:
    """Return the log-probabilities of ``ids[1:]`` in nats.

    Args:
        index: Index of the entry, for messages.
        meta: Its ``meta_info``.
        ids: Token ids from ``logprob_start_len`` on.
        vocab_size: Vocabulary size of the served model.

    Raises:
        EngineReplyInvalid: The entry scores other ids, or has values that are not finite.
    """
    rows = meta.get("input_token_logprobs")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) >= 2 for row in rows):
        raise EngineReplyInvalid(f"answer {index} has no list of input_token_logprobs: {str(rows)[:200]}")
    # sglang 0.5.23 echoes every id >= vocab_size - 1 as 0 (scheduler_components/logprob_result_processor.py:54); the
    # rule is meant for the hashes that stand for images, but hits the last id of the vocabulary too.
    if [row[1] for row in rows] != [token_id if token_id < vocab_size - 1 else 0 for token_id in ids]:
        raise EngineReplyInvalid(
            f"answer {index} scores other ids than were sent: {[row[1] for row in rows][:20]}"
        )
    values = [row[0] for row in rows[1:]]  # nothing predicts the first token: null
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in values):
        raise EngineReplyInvalid(f"answer {index} has a log-prob that is not a finite number: {values[:20]}")
    return tuple(float(value) for value in values)


def check_success(reply: Any, action: str) -> None:
    """Raise ``EngineReplyInvalid`` unless a weight update reports success."""
    # Failed updates also answer with status 200.
    if not isinstance(reply, dict) or reply.get("success") is not True:
        raise EngineReplyInvalid(f"{action} did not succeed: {str(reply)[:500]}")


def reply_entries(reply: Any, num_expected: int) -> list[Any]:
    """Return the entries of a batch reply; raise ``EngineReplyInvalid`` for another number."""
    if not isinstance(reply, list) or len(reply) != num_expected:
        what = (
            f"{len(reply)} answers"
            if isinstance(reply, list)
            else f"{type(reply).__name__} {str(reply)[:200]}"
        )
        raise EngineReplyInvalid(f"sent {num_expected} prompts, received {what}")
    return reply


def meta_info(index: int, entry: Any) -> dict[str, Any]:
    """Return ``meta_info`` of an entry; raise ``EngineReplyInvalid`` if it was aborted."""
    meta = entry.get("meta_info") if isinstance(entry, dict) else None
    if not isinstance(meta, dict):
        raise EngineReplyInvalid(f"answer {index} has no meta_info: {str(entry)[:200]}")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise EngineReplyInvalid(f"the server aborted prompt {index}: {reason.get('message')}")
    return meta


def check_version(index: int, meta: dict[str, Any], expected: WeightVersion) -> None:
    """Check that the expected weights alone produced an entry.

    Raises:
        EngineReplyInvalid: The entry has no version.
        StaleWeights: Another version took part.
    """
    # One span per version since 0.5.19: an update while a request is in flight leaves two.
    spans = meta.get("weight_versions")
    if not isinstance(spans, list) or not spans or not all(isinstance(span, dict) for span in spans):
        raise EngineReplyInvalid(f"answer {index} has no weight_versions: {str(spans)[:200]}")
    versions = [str(span.get("version")) for span in spans]
    if versions != [str(expected)]:
        raise StaleWeights(
            f"answer {index} was made by weight versions {versions}, expected only {expected}; push the weights before "
            "generating, and not while a request runs"
        )


def _parse_completion(
    index: int, entry: Any, sampling: Sampling, vocab_size: int, expected_version: WeightVersion
) -> Completion:
    meta = meta_info(index, entry)
    check_version(index, meta, expected_version)
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
            f"answer {index} has {len(ids)} tokens, more than max_new_tokens={sampling.max_new_tokens}"
        )
    return Completion(tuple(ids), kind, expected_version if isinstance(expected_version, int) else -1)


def _check_stopped(index: int, ids: list[int], matched: Any, stop_token_ids: Sequence[int]) -> None:
    if type(matched) is not int:
        raise EngineReplyInvalid(f"answer {index} stopped at {matched!r}, which is not a token id")
    # sglang 0.5.23 includes the stop token in output_ids. It need not be one of ours: the server adds the
    # end-of-sequence ids of the model's config.json and generation_config.json.
    stops = {matched, *stop_token_ids}
    if not ids or ids[-1] != matched or stops & set(ids[:-1]):
        raise EngineReplyInvalid(
            f"answer {index} reports stop token {matched}, but its ids end with {ids[-20:]}"
        )


def _check_full_length(index: int, ids: list[int], sampling: Sampling) -> None:
    # SGLang silently shortens a request that exceeds its context, and reports "length" then too.
    if len(ids) != sampling.max_new_tokens:
        raise EngineReplyInvalid(
            f"answer {index} ended for its length after {len(ids)} of {sampling.max_new_tokens} tokens: the server's "
            "context length is too small for prompt + max_new_tokens"
        )
    if stopped := set(ids) & set(sampling.stop_token_ids):
        raise EngineReplyInvalid(f"answer {index} continues after stop token {min(stopped)}")
