"""Client of an SGLang server that teaches: its weights stay, and whole rows of its distributions are asked for."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.errors import EngineReplyInvalid, EngineRequestInvalid, StaleWeights
from megatron_gkd.serving.request_checks import check_prompts
from megatron_gkd.serving.top_k import TopK, parse_top_k

NO_VOCABULARY_HAS_THIS_ID = 2**31 - 1


class TeacherClient(SglangClient):
    """A guarded client that scores given sequences.

    Args:
        url: Such as ``http://10.0.0.5:30000``.
        vocab_size: Rows of the served model's head.
        top_k: Entries per scored token, at most ``vocab_size``: more would kill the server.
        requests_in_flight: Sequences that the server is asked about at the same time.
        request_timeout_s: Longest time of one request, which is about one sequence.
        max_retries: Repetitions after a failed connection or an answer of 500 and above.
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
        """Refuse a server that serves something else than expected, and remember the name of its weights.

        Args:
            model_type: As in the config.json of the expected model.
            num_sequence_tokens: Longest prompt plus completion.

        Returns:
            The server's name of the model's folder.

        Raises:
            EngineError: It does not answer, or serves another kind of model, another vocabulary or too short a context.
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

    def score_top_k(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TopK]:
        """The most probable tokens behind position ``starts[i]`` of each sequence; several requests at a time.

        Args:
            sequences: Token ids, each list non-empty.
            starts: Per sequence the last token that is not scored, such as the last one of the prompt.

        Returns:
            Per sequence a row for every token after its start.

        Raises:
            EngineRequestInvalid: A sequence must not be sent.
            StaleWeights: The server's weights are not those that ``check_model`` saw.
            EngineError: Any of its kinds; requests that run already are waited for, no further one is sent.
        """
        check_prompts(sequences, self.vocab_size)
        for ids, start in zip(sequences, starts, strict=True):
            if not 0 <= start < len(ids):
                raise EngineRequestInvalid(
                    f"start {start} is not a position of a sequence of {len(ids)} tokens"
                )
        with ThreadPoolExecutor(max_workers=self._requests_in_flight) as threads:
            asked = [threads.submit(self._score_one, *pair) for pair in zip(sequences, starts, strict=True)]
            for future in as_completed(asked):
                if failure := future.exception():
                    threads.shutdown(cancel_futures=True)
                    raise failure
        return [future.result() for future in asked]

    def _score_one(self, ids: Sequence[int], start: int) -> TopK:
        if start == len(ids) - 1:
            return TopK.empty(self.top_k)
        expected_version = self._expected_version(allow_stale=False)
        reply = self._connection.post(
            "/generate",
            {
                "input_ids": [list(ids)],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": self.top_k,
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
        """SGLang names the size only where it refuses an id beyond it; it does so before the model sees anything."""
        probe = {
            "input_ids": [[0]],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "token_ids_logprob": [[NO_VOCABULARY_HAS_THIS_ID]],
        }
        try:
            self._connection.post("/generate", probe)
        except EngineReplyInvalid as refusal:
            if found := re.search(r"valid range is \[0, (\d+)\)", str(refusal)):
                return int(found[1])
            raise
        raise EngineReplyInvalid(f"{self.url} takes any token id and does not say the size of its vocabulary")
