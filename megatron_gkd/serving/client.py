"""HTTP client of one SGLang server, with validated requests and replies."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_gkd.serving.connection import Connection
from megatron_gkd.serving.errors import EngineError, EngineReplyInvalid, StaleWeights
from megatron_gkd.serving.protocol import (
    Completion,
    Sampling,
    WeightVersion,
    check_prompts,
    check_seeds,
    check_success,
    check_weight_files,
    parse_completions,
    parse_prompt_logprobs,
)

log = logging.getLogger(__name__)

# The plugin interface and the weight-update endpoints changed between 0.5.20 and 0.5.23; other releases get a warning.
TESTED_SGLANG = "0.5.23"
FLUSH_TIMEOUT_S = 30


class SglangClient:
    """Client of one server.

    Every request is idempotent and may be retried: seeds are fixed, and repeating an update gives the same weights.

    Args:
        url: Such as ``http://127.0.0.1:30000``.
        vocab_size: Vocabulary size of the served model; larger ids would kill the server.
        request_timeout_s: Timeout of one attempt.
        max_retries: Retries after a failed connection or a 5xx status.
        api_key: Bearer token of the server.
        is_alive: Raises ``EngineDied`` when the server's process has ended; polled while waiting for a reply.
        weight_version: Version of the weights that the server was started with; ``None`` if unknown.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        request_timeout_s: float,
        max_retries: int,
        api_key: str | None = None,
        is_alive: Callable[[], None] | None = None,
        weight_version: WeightVersion | None = None,
    ):
        self.vocab_size = vocab_size
        self.weight_version = weight_version
        self._connection = Connection(
            url,
            request_timeout_s=request_timeout_s,
            max_retries=max_retries,
            api_key=api_key,
            is_alive=is_alive,
        )

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return self._connection.url

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        """Sample one completion per prompt in a single request.

        Repeating the same prompts and seeds in one request gives the same ids, provided that the server runs with
        deterministic inference (see ``check_settings``).

        Args:
            prompts: Token ids, each list non-empty. No prompts: no request.
            seeds: One per prompt, all different, in [0, 2**63).
            sampling: Sampling parameters.

        Raises:
            EngineRequestInvalid: Invalid prompts or seeds; nothing was sent.
            StaleWeights: Other weights than the last pushed version took part, or none was pushed yet.
            EngineError: Any other failure.
        """
        check_prompts(prompts, self.vocab_size)
        check_seeds(seeds, len(prompts))
        if not prompts:
            return []
        expected_version = self._expected_version()
        common = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
        }
        # One request for all prompts, so that a repeated run forms the same batches: on CPU the same batch of 8 was
        # bit-equal, while one by one no log-prob was. The key is sampling_seed, an element of sampling_params; SGLang
        # ignores unknown top-level keys.
        reply = self._connection.post(
            "/generate",
            {
                "input_ids": [list(ids) for ids in prompts],
                "sampling_params": [{**common, "sampling_seed": seed} for seed in seeds],
            },
        )
        return parse_completions(
            reply,
            num_prompts=len(prompts),
            sampling=sampling,
            vocab_size=self.vocab_size,
            expected_version=expected_version,
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return log-probabilities of given tokens under the served weights, at temperature 1.

        Args:
            sequences: Token ids, each list non-empty.

        Returns:
            Per sequence the log-probabilities in nats from its second token on, one less than it has tokens.

        Raises:
            EngineRequestInvalid: Invalid sequences; nothing was sent.
            StaleWeights: Other weights than the last pushed version took part.
            EngineError: Any other failure.
        """
        check_prompts(sequences, self.vocab_size)
        if not sequences:
            return []
        expected_version = self._expected_version()
        reply = self._connection.post(
            "/generate",
            {
                "input_ids": [list(ids) for ids in sequences],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                # From the first token on: the scored part does not reuse cached prefixes, which may stem from older weights.
                "logprob_start_len": 0,
            },
        )
        return parse_prompt_logprobs(
            reply, sequences=sequences, vocab_size=self.vocab_size, expected_version=expected_version
        )

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        """Load weights from the safetensors files in ``folder``, under Hugging Face names.

        The caller must ensure that the folder is complete: SGLang keeps the old values of missing tensors and reports
        success.

        Raises:
            EngineRequestInvalid: The files are damaged; nothing was sent.
            EngineReplyInvalid: The server did not load them.
            StaleWeights: The server reports success but another version.
        """
        check_weight_files(folder)
        # None until confirmed: after a failed update the server may hold old weights or a mixture.
        self.weight_version = None
        reply = self._connection.post(
            "/update_weights_from_disk",
            {
                "model_path": str(folder.resolve()),
                # Explicitly: the server may have been started with load_format dummy.
                "load_format": "safetensors",
                "weight_version": str(version),
                # Would fail while any request is running, a health check included; flushed below instead.
                "flush_cache": False,
            },
        )
        check_success(reply, f"loading weights from {folder}")
        self._flush_cache()
        self._confirm_version(version)

    def model_info(self) -> dict[str, Any]:
        """Return ``model_path``, ``weight_version`` (a string), ``architectures`` and more."""
        return _as_object(self._connection.get("/model_info"), "/model_info")

    def check_settings(self, *, num_sequence_tokens: int, must_honour_seeds: bool = True) -> None:
        """Reject server settings that would corrupt results silently.

        Args:
            num_sequence_tokens: Maximum length of prompt plus completion.
            must_honour_seeds: Whether the server will be used for sampling.

        Raises:
            EngineReplyInvalid: The server ignores seeds or would truncate sequences.
        """
        info = _as_object(self._connection.get("/server_info"), "/server_info")
        if info.get("version") != TESTED_SGLANG:
            log.warning("%s runs sglang %s, tested is %s", self.url, info.get("version"), TESTED_SGLANG)
        if must_honour_seeds and info.get("enable_deterministic_inference") is not True:
            raise EngineReplyInvalid(
                f"{self.url} ignores seeds; start it with --enable-deterministic-inference"
            )
        # A prompt that is too long is an error, but a completion that does not fit is shortened silently.
        limit = info.get("max_req_input_len")
        if isinstance(limit, int) and limit < num_sequence_tokens:
            raise EngineReplyInvalid(
                f"{self.url} takes sequences of {limit} tokens, prompt + max_new_tokens are {num_sequence_tokens}; "
                "start it with a larger --context-length"
            )

    def _flush_cache(self) -> None:
        """Drop cached prefixes: their keys and values were computed with the old weights."""
        try:
            self._connection.post("/flush_cache", {}, is_json=False)
        except EngineReplyInvalid:
            # Status 400 while a request is running. With a timeout the server waits for it to end.
            self._connection.post(f"/flush_cache?timeout={FLUSH_TIMEOUT_S}", {}, is_json=False)

    def _expected_version(self) -> WeightVersion:
        if self.weight_version is None:
            raise StaleWeights(f"the weights of {self.url} are unknown; push the weights before generating")
        return self.weight_version

    def _confirm_version(self, version: int) -> None:
        reported = self.model_info().get("weight_version")
        if reported != str(version):
            raise StaleWeights(
                f"pushed version {version} to {self.url}, which reports success but version {reported}"
            )
        self.weight_version = version


def _as_object(reply: Any, path: str) -> dict[str, Any]:
    if not isinstance(reply, dict):
        raise EngineError(f"{path} answered {type(reply).__name__}, not an object")
    return reply
