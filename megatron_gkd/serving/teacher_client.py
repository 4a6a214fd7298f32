"""HTTP client of an SGLang teacher: fixed weights, top-k log-probabilities of given sequences."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.errors import EngineReplyInvalid, EngineRequestInvalid, StaleWeights
from megatron_gkd.serving.protocol import check_prompts
from megatron_gkd.serving.top_k import TopKLogProbs, parse_top_k

OUT_OF_VOCABULARY_ID = 2**31 - 1


class TeacherClient(SglangClient):
    """Client that scores given sequences.

    Args:
        url: Such as ``http://10.0.0.5:30000``.
        vocab_size: Vocabulary size of the served model.
        top_k: Entries per scored token, at most ``vocab_size``: more would kill the server.
        requests_in_flight: Maximum number of concurrent requests.
        request_timeout_s: Timeout of one request, which scores one sequence.
        max_retries: Retries after a failed connection or a 5xx status.
        api_key: Bearer token of the server.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab_size: int,
        top_k: int,
        requests_in_flight: int,
        request_timeout_s: float,
        max_retries: int,
        api_key: str | None = None,
    ):
        super().__init__(
            url,
            vocab_size=vocab_size,
            request_timeout_s=request_timeout_s,
            max_retries=max_retries,
            api_key=api_key,
        )
        if not 1 <= top_k <= vocab_size:
            raise EngineRequestInvalid(f"top_k={top_k} is not in [1, vocab_size={vocab_size}]")
        self.top_k = top_k
        self._requests_in_flight = requests_in_flight

    def check_model(self, *, model_type: str, num_sequence_tokens: int) -> str:
        """Check that the server serves the expected model, and pin its weight version.

        Args:
            model_type: ``model_type`` in the expected model's config.json.
            num_sequence_tokens: Maximum length of prompt plus completion.

        Returns:
            The model path reported by the server.

        Raises:
            EngineError: Unreachable, or another model type, another vocabulary size or too short a context.
        """
        info = self.model_info()
        if info.get("is_generation") is not True or info.get("model_type") != model_type:
            raise EngineReplyInvalid(
                f"{self.url} serves {info.get('model_path')}, a model of type {info.get('model_type')!r} "
                f"(is_generation={info.get('is_generation')}), expected is {model_type!r}"
            )
        if (served := self._served_vocab_size()) != self.vocab_size:
            raise EngineReplyInvalid(
                f"{self.url} serves {info.get('model_path')} with vocab_size={served}, expected is {self.vocab_size}"
            )
        self.check_settings(num_sequence_tokens=num_sequence_tokens, must_honour_seeds=False)
        self.weight_version = str(info.get("weight_version"))
        return str(info.get("model_path"))

    def score_top_k(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TopKLogProbs]:
        """Return the teacher's top-k distribution at every position after ``starts[i]``.

        Args:
            sequences: Token ids, each list non-empty.
            starts: Per sequence the index of the last token that is not scored, such as the last prompt token.

        Returns:
            Per sequence one row for every token after its start.

        Raises:
            EngineRequestInvalid: Invalid sequences; nothing was sent.
            StaleWeights: The server's weights have changed since ``check_model``.
            EngineError: Any other failure, after the requests in flight have ended; pending ones are cancelled.
        """
        check_prompts(sequences, self.vocab_size)
        for ids, start in zip(sequences, starts, strict=True):
            if not 0 <= start < len(ids):
                raise EngineRequestInvalid(
                    f"start {start} is not a position of a sequence of {len(ids)} tokens"
                )
        # One request per sequence: the server batches them itself, and a retry repeats one sequence only.
        with ThreadPoolExecutor(max_workers=self._requests_in_flight) as threads:
            futures = [threads.submit(self._score_one, *pair) for pair in zip(sequences, starts, strict=True)]
            for future in as_completed(futures):
                if failure := future.exception():
                    threads.shutdown(cancel_futures=True)
                    raise failure
        return [future.result() for future in futures]

    def _score_one(self, ids: Sequence[int], start: int) -> TopKLogProbs:
        if start == len(ids) - 1:
            return TopKLogProbs.empty(self.top_k)
        expected_version = self._expected_version()
        reply = self._connection.post(
            "/generate",
            {
                "input_ids": [list(ids)],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": self.top_k,
                # Flat base64 arrays instead of nested JSON lists: 11.3 MB instead of 31.3 MB for 2,048 tokens, top 512.
                "return_flat_raw_top_logprobs": True,
                "return_flat_raw_top_logprobs_b64": True,
            },
        )
        try:
            return parse_top_k(
                reply,
                ids=ids,
                start=start,
                top_k=self.top_k,
                vocab_size=self.vocab_size,
                expected_version=expected_version,
            )
        except StaleWeights as error:
            raise StaleWeights(
                f"the weights of the teacher at {self.url} changed during the run; give it a server of its own ({error})"
            ) from error

    def _served_vocab_size(self) -> int:
        # No endpoint of sglang 0.5.23 reports the vocabulary size. It is part of the error for an id that is too large,
        # which is raised before the model runs.
        probe = {
            "input_ids": [[0]],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "token_ids_logprob": [[OUT_OF_VOCABULARY_ID]],
        }
        try:
            self._connection.post("/generate", probe)
        except EngineReplyInvalid as refusal:
            if found := re.search(r"valid range is \[0, (\d+)\)", str(refusal)):
                return int(found[1])
            raise
        raise EngineReplyInvalid(f"{self.url} accepts any token id and does not report its vocabulary size")
