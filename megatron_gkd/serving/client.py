"""Guarded client of one SGLang server: nothing is sent that kills the server, nothing wrong is accepted from it."""

import base64
import logging
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_gkd.serving.completion import Completion, Sampling
from megatron_gkd.serving.connection import Connection
from megatron_gkd.serving.errors import EngineError, EngineReplyInvalid, EngineRequestInvalid, StaleWeights
from megatron_gkd.serving.replies import (
    WeightVersion,
    check_success,
    parse_completions,
    parse_prompt_logprobs,
)
from megatron_gkd.serving.request_checks import check_prompts, check_seeds, check_weight_files

log = logging.getLogger(__name__)

TESTED_SGLANG = "0.5.23"
HEALTH_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 30
MAX_PUSHED_BY_VALUE_BYTES = 64 << 20


class SglangClient:
    """Talks to one server.

    Args:
        url: Such as ``http://127.0.0.1:30000``.
        vocab_size: Rows of the served model's embedding; an id beyond it would kill the server.
        request_timeout_s: Longest time of one request.
        max_retries: Repetitions after a failed connection or an answer of 500 and above. All requests may be repeated:
            seeds are fixed, and an update repeated with the same version ends in the same weights.
        api_key: Bearer token of the server.
        is_alive: Raises ``EngineDied`` when the server's process is gone; called while waiting for an answer.
        weight_version: Version of the weights that the server was started with, None if unknown.
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
        """Address of the server."""
        return self._connection.url

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        allow_stale: bool = False,
    ) -> list[Completion]:
        """One completion per prompt, by a single request; no prompts need no request.

        The same prompts with the same seeds in one request give the same ids again (the server must run with
        deterministic inference, see ``check_settings``).

        Args:
            prompts: Token ids, each list non-empty.
            seeds: One per prompt, all different, in [0, 2**63).
            sampling: Distribution and limits.
            allow_stale: Accept completions of other or of several weight versions.

        Raises:
            EngineRequestInvalid: A prompt or seed must not be sent.
            StaleWeights: Another version than the last pushed one made a completion, or none was pushed yet.
            EngineError: Any of its kinds.
        """
        check_prompts(prompts, self.vocab_size)
        check_seeds(seeds, len(prompts))
        if not prompts:
            return []
        expected_version = self._expected_version(allow_stale)
        common = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
        }
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

    def score(
        self, sequences: Sequence[Sequence[int]], *, allow_stale: bool = False
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of given tokens under the served weights, at temperature 1.

        Scores from the first token on, so that no cached prefix, perhaps of older weights, takes part.

        Args:
            sequences: Token ids, each list non-empty.
            allow_stale: Accept any weight version.

        Returns:
            Per sequence the log-probabilities in nats of its second to last token, one less than it has tokens.

        Raises:
            EngineRequestInvalid: A sequence must not be sent.
            StaleWeights: Another version than the last pushed one scored.
            EngineError: Any of its kinds.
        """
        check_prompts(sequences, self.vocab_size)
        if not sequences:
            return []
        expected_version = self._expected_version(allow_stale)
        reply = self._connection.post(
            "/generate",
            {
                "input_ids": [list(ids) for ids in sequences],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        return parse_prompt_logprobs(
            reply, sequences=sequences, vocab_size=self.vocab_size, expected_version=expected_version
        )

    def update_weights_from_disk(self, folder: Path, version: int) -> None:
        """Load all weights from the safetensors files in ``folder``, under full Hugging Face names.

        The server does not notice missing tensors: it answers success and keeps the old ones. Whoever writes the
        folder checks that it is complete.

        Raises:
            EngineRequestInvalid: The files are damaged; nothing was sent.
            EngineReplyInvalid: The server did not load them.
            StaleWeights: It answers success but reports another version.
        """
        check_weight_files(folder)
        self.weight_version = None  # unknown until confirmed
        reply = self._connection.post(
            "/update_weights_from_disk",
            {
                "model_path": str(folder.resolve()),
                "load_format": "safetensors",  # whatever the server started with, which may be random weights
                "weight_version": str(version),
                "flush_cache": False,  # refused while any request runs, a health check among them; done below
            },
        )
        check_success(reply, f"loading weights from {folder}")
        self.flush_cache()
        self._confirm_version(version)

    def push_tensors(
        self, named_tensors: Iterable[tuple[str, Any]], version: int, *, tp_size: int = 1
    ) -> None:
        """Send tensors by value. For tiny models: 208 MB take 7 to 13 s this way.

        After a failure the server's weights are partly new: push all of them again.

        Args:
            named_tensors: Full Hugging Face names with unsharded CPU tensors.
            version: Version of the weights after it.
            tp_size: Tensor-parallel size of the server; each of its ranks gets a copy.

        Raises:
            EngineRequestInvalid: More than 64 MiB.
            EngineReplyInvalid: The server refused.
            StaleWeights: It answers success but reports another version.
        """
        tensors = [(name, tensor.detach()) for name, tensor in named_tensors]
        num_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        if num_bytes > MAX_PUSHED_BY_VALUE_BYTES:
            raise EngineRequestInvalid(
                f"{num_bytes} bytes are too many to send by value; use update_weights_from_disk"
            )
        payload = base64.b64encode(pickle.dumps(tensors)).decode("ascii")
        self.weight_version = None
        check_success(
            self._connection.post("/begin_weight_update", {"selector": "all"}), "begin_weight_update"
        )
        try:
            reply = self._connection.post(
                "/update_weights_from_tensor",
                {
                    "serialized_named_tensors": [payload] * tp_size,
                    "weight_version": str(version),
                    "flush_cache": False,
                },
            )
        finally:  # an update left open would refuse the next one
            ended = self._connection.post("/end_weight_update", {})
        check_success(reply, "update_weights_from_tensor")
        check_success(ended, "end_weight_update")
        self.flush_cache()
        self._confirm_version(version)

    def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Hold generation: drop the running requests, recompute them later, or freeze them as they are."""
        self._connection.post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._connection.post("/continue_generation", {})

    def flush_cache(self) -> None:
        """Forget cached prefixes, once the requests that run have ended; a paused server does not wait for held ones.

        Raises:
            EngineReplyInvalid: Requests still ran after 30 s.
        """
        try:
            self._connection.post("/flush_cache", {}, is_json=False)
        except EngineReplyInvalid:  # something runs
            self._connection.post(f"/flush_cache?timeout={FLUSH_TIMEOUT_S}", {}, is_json=False)

    def health(self) -> None:
        """Returns when the server has produced a token, raises ``EngineError`` otherwise."""
        self._connection.get("/health", timeout_s=HEALTH_TIMEOUT_S, is_json=False)

    def model_info(self) -> dict[str, Any]:
        """What the server serves: ``model_path``, ``weight_version`` (a string), ``architectures`` and more."""
        return _as_object(self._connection.get("/model_info"), "/model_info")

    def check_settings(self, *, num_sequence_tokens: int, must_honour_seeds: bool = True) -> None:
        """Refuse a server whose settings would spoil the results without a word.

        Args:
            num_sequence_tokens: Longest prompt plus completion.
            must_honour_seeds: Whether anything will be sampled.

        Raises:
            EngineReplyInvalid: Seeds would be ignored, or sequences would be cut short.
        """
        info = _as_object(self._connection.get("/server_info"), "/server_info")
        if info.get("version") != TESTED_SGLANG:
            log.warning("%s runs sglang %s, tested is %s", self.url, info.get("version"), TESTED_SGLANG)
        if must_honour_seeds and info.get("enable_deterministic_inference") is not True:
            raise EngineReplyInvalid(
                f"{self.url} ignores seeds; start it with --enable-deterministic-inference"
            )
        limit = info.get("max_req_input_len")
        if isinstance(limit, int) and limit < num_sequence_tokens:
            raise EngineReplyInvalid(
                f"{self.url} takes sequences of {limit} tokens, prompt + max_new_tokens are {num_sequence_tokens}; "
                "start it with a larger --context-length"
            )

    def _expected_version(self, allow_stale: bool) -> WeightVersion | None:
        if allow_stale:
            return None
        if self.weight_version is None:
            raise StaleWeights(f"the weights of {self.url} are unknown; push the weights before generating")
        return self.weight_version

    def _confirm_version(self, version: int) -> None:
        reported = self.model_info().get("weight_version")
        if reported != str(version):
            raise StaleWeights(
                f"pushed version {version} to {self.url}, which answered success but reports {reported}"
            )
        self.weight_version = version


def _as_object(reply: Any, path: str) -> dict[str, Any]:
    if not isinstance(reply, dict):
        raise EngineError(f"{path} answered {type(reply).__name__}, not an object")
    return reply
