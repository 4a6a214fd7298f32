"""Decoding and validation of top-k log-probabilities from a teacher server.

Shapes: T = scored tokens, K = entries per token.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_gkd.serving.errors import EngineReplyInvalid
from megatron_gkd.serving.protocol import (
    WeightVersion,
    check_version,
    meta_info,
    parse_token_log_probs,
    reply_entries,
)

# Error of fp32 sums over a vocabulary; a wrong or shifted row differs by far more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class TopKLogProbs:
    """Next-token distributions of a model at the scored positions, cut to the top k.

    Attributes:
        ids_TK: [T, K] int32, most probable first, distinct within a row.
        log_probs_TK: [T, K] float32 in nats at temperature 1, normalized over the full vocabulary.
        token_log_probs_T: [T] float32, of the actual tokens of the sequence.
    """

    ids_TK: NDArray[np.int32]
    log_probs_TK: NDArray[np.float32]
    token_log_probs_T: NDArray[np.float32]

    @classmethod
    def empty(cls, top_k: int) -> "TopKLogProbs":
        """Return zero rows."""
        no_rows = np.zeros((0, top_k), np.float32)
        return cls(no_rows.astype(np.int32), no_rows, no_rows[:, 0])

    def select(self, mask_T: Sequence[bool]) -> "TopKLogProbs":
        """Return the rows where the mask is true."""
        kept_T = np.array(mask_T, dtype=bool)
        return TopKLogProbs(self.ids_TK[kept_T], self.log_probs_TK[kept_T], self.token_log_probs_T[kept_T])


def parse_top_k(
    reply: Any,
    *,
    ids: Sequence[int],
    start: int,
    top_k: int,
    vocab_size: int,
    expected_version: WeightVersion,
) -> TopKLogProbs:
    """Parse the top-k distributions at the positions of ``ids[start + 1:]``.

    Args:
        reply: Decoded reply of ``/generate`` to a batch of one sequence, with ``logprob_start_len: start``.
        ids: The sequence sent.
        start: Index of the last token that is not scored.
        top_k: Requested entries per position.
        vocab_size: Upper bound of token ids.
        expected_version: Weight version that must have scored the sequence.

    Raises:
        EngineReplyInvalid: The reply violates the contract.
        StaleWeights: Other weights scored the sequence.
    """
    (entry,) = reply_entries(reply, 1)
    meta = meta_info(0, entry)
    check_version(0, meta, expected_version)
    token_log_probs = parse_token_log_probs(0, meta, ids[start:], vocab_size)
    _check_layout(meta, [len(token_log_probs), top_k])
    rows = TopKLogProbs(
        _decode(meta, "idx", np.dtype("<i4")).reshape(-1, top_k),
        _decode(meta, "val", np.dtype("<f4")).reshape(-1, top_k),
        np.array(token_log_probs, np.float32),
    )
    _check_distributions(rows, vocab_size)
    _check_tokens(rows, np.array(ids[start + 1 :], np.int32))
    return rows


def _check_layout(meta: dict[str, Any], shape: list[int]) -> None:
    # The null prefix is the row of the first token, which nothing predicts. The other rows predict the token after them.
    got, nulls = meta.get("input_top_logprobs_shape"), meta.get("input_top_logprobs_null_prefix")
    if got != shape or nulls != 1:
        raise EngineReplyInvalid(
            f"the top log-probs have shape {got} after {nulls} empty rows, asked for {shape} after 1"
        )


def _decode(meta: dict[str, Any], name: str, dtype: np.dtype) -> NDArray:
    key = f"input_top_logprobs_{name}_flat_b64"
    text, kind = meta.get(key), meta.get(f"{key}_dtype")
    if not isinstance(text, str) or kind != dtype.name:
        raise EngineReplyInvalid(f"{key} is {type(text).__name__} of {kind}, not base64 of {dtype.name}")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise EngineReplyInvalid(f"{key} is not base64: {error}") from error
    rows, top_k = meta["input_top_logprobs_shape"]
    if len(data) != rows * top_k * dtype.itemsize:
        raise EngineReplyInvalid(
            f"{key} has {len(data)} bytes, {rows} x {top_k} entries need {rows * top_k * dtype.itemsize}"
        )
    return np.frombuffer(data, dtype)


def _check_distributions(rows: TopKLogProbs, vocab_size: int) -> None:
    """Check that each row is the head of a distribution over the vocabulary."""
    # The ids here are true ids, the last one of the vocabulary included, unlike those echoed in input_token_logprobs.
    ids_TK, log_probs_TK = rows.ids_TK, rows.log_probs_TK
    sorted_TK = np.sort(ids_TK, axis=1)
    mass_T1 = np.exp(log_probs_TK.astype(np.float64)).sum(1, keepdims=True)
    for is_wrong_TK, what in (
        ((ids_TK < 0) | (ids_TK >= vocab_size), f"ids outside [0, {vocab_size})"),
        (sorted_TK[:, 1:] == sorted_TK[:, :-1], "an id twice"),
        (~np.isfinite(log_probs_TK), "a log-prob that is not finite"),
        (log_probs_TK[:, 1:] > log_probs_TK[:, :-1], "log-probs that are not sorted"),
        (mass_T1 > 1 + TOLERANCE, "a probability mass above 1"),
    ):
        _raise_first(is_wrong_TK, what, rows)


def _check_tokens(rows: TopKLogProbs, tokens_T: NDArray[np.int32]) -> None:
    """Check the rows against the log-probabilities of the actual tokens."""
    # Two independent statements about one position: rows that were shifted or belong to another sequence differ.
    is_token_TK = rows.ids_TK == tokens_T[:, None]
    token_T1 = rows.token_log_probs_T[:, None]
    differs_TK = is_token_TK & (np.abs(rows.log_probs_TK - token_T1) > TOLERANCE)
    is_left_out_T1 = ~is_token_TK.any(1, keepdims=True) & (token_T1 > rows.log_probs_TK[:, -1:] + TOLERANCE)
    _raise_first(
        differs_TK | is_left_out_T1,
        "a log-prob of the next token that differs from input_token_logprobs",
        rows,
    )


def _raise_first(is_wrong_TK: NDArray[np.bool_], what: str, rows: TopKLogProbs) -> None:
    wrong_rows = is_wrong_TK.nonzero()[0]
    if not len(wrong_rows):
        return
    row = wrong_rows[0]
    raise EngineReplyInvalid(
        f"row {row} of {len(is_wrong_TK)} of the top log-probs has {what}: ids {rows.ids_TK[row, :8].tolist()}, log-probs "
        f"{rows.log_probs_TK[row, :8].tolist()}, of the next token {rows.token_log_probs_T[row]:g}"
    )
