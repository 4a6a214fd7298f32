"""One row to token ids, or the reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_gkd.data.conversation import assistant_spans
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.tokenizer import MessagesRefused, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, str]]


class BadRow(Exception):
    """Why a row cannot be used."""


class OverlongRow(Exception):
    """Which part of a row is too long."""


class RowKeys(NamedTuple):
    """Names of the columns."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    teacher_prompt: str = "teacher_prompt"


DEFAULT_KEYS = RowKeys()


@dataclass(frozen=True)
class RowLimits:
    """Tokens of the longest parts of a row that are used.

    Attributes:
        prompt: Longest prompt.
        teacher_prompt: Longest prompt for the teacher; ``None``: as ``prompt``.
        completion: Longest completion, end-of-sequence token included; ``None`` keeps all. Never cut.
        truncation: Whether a longer prompt is refused, or cut at its beginning (left) or end (right).
    """

    prompt: int
    teacher_prompt: int | None = None
    completion: int | None = None
    truncation: Literal["error", "left", "right"] = "error"


class EncodedPrompt(NamedTuple):
    """A prompt's text and ids.

    ``loss_mask`` has one flag per id, or none: which of them belong to earlier turns of the assistant.
    """

    text: str
    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...] = ()


class RowEncoder:
    """Turns rows into prompts.

    Texts get the tokenizer's default special tokens, chat messages go through its template, completions have no
    special token but an end-of-sequence token at their end.

    Args:
        tokenizer: Encodes every text.
        limits: What is too long.
        keys: Names of the columns.
    """

    def __init__(self, tokenizer: Tokenizer, limits: RowLimits, keys: RowKeys = DEFAULT_KEYS):
        self.tokenizer, self._limits, self._keys = tokenizer, limits, keys

    def encode(self, row: Mapping[str, Any], *, number: int, file: int = 0) -> Prompt:
        """The prompt of a row.

        Args:
            row: Columns by name.
            number: Line or row of the file, from 1.
            file: Place of the file in the list of files.

        Raises:
            BadRow: Something is missing, empty, of a wrong type, or refused by the chat template.
            OverlongRow: A part is longer than its limit.
            DataError: The tokenizer cannot encode any row of this kind (no chat template).
        """
        prompt, completion = self._prompt_and_completion(row)
        completion_ids = self._encode_completion(completion)
        limits = self._limits
        prompt = self._fit(prompt, limits.prompt, "prompt", "data.max_prompt_length")
        teacher_ids = self._encode_teacher_prompt(row.get(self._keys.teacher_prompt))
        if limits.completion is not None and len(completion_ids or ()) > limits.completion:
            raise OverlongRow(
                f"completion has {len(completion_ids or ())} tokens, more than rollout.max_new_tokens={limits.completion}"
            )
        return Prompt(
            row=number - 1,
            ids=prompt.ids,
            completion_ids=completion_ids,
            text=prompt.text,
            file=file,
            # the teacher's own prompt has no rows for the earlier turns
            loss_mask=() if teacher_ids else prompt.loss_mask,
            teacher_ids=teacher_ids,
        )

    def unused_keys(self, row: Mapping[str, Any]) -> set[str]:
        """Columns of the row that ``encode`` does not look at."""
        used = set(self._keys)
        if row.get(self._keys.prompt) is not None:
            used.discard(self._keys.messages)
        return set(row) - used

    def _prompt_and_completion(self, row: Mapping[str, Any]) -> tuple[EncodedPrompt, Any]:
        keys = self._keys
        prompt, messages, completion = (row.get(key) for key in (keys.prompt, keys.messages, keys.completion))
        if prompt is not None:
            return self._encode_prompt(prompt, keys.prompt), completion
        if messages is None:
            raise BadRow(
                f"no {keys.prompt} and no {keys.messages} among its keys ({', '.join(map(str, row))}); set "
                "data.prompt_key or data.messages_key"
            )
        _check_messages(messages, keys.messages)
        if messages[-1]["role"] != "assistant":
            return self._encode_conversation(messages), completion
        if completion is not None:
            raise BadRow(
                f"{keys.messages} end with the assistant's turn, and there is a {keys.completion} too"
            )
        if len(messages) == 1:
            raise BadRow(f"{keys.messages} begin with the assistant's turn; nothing asks for it")
        return self._encode_conversation(messages[:-1]), messages[-1]["content"]

    def _encode_prompt(self, prompt: Any, key: str) -> EncodedPrompt:
        if isinstance(prompt, list):
            _check_messages(prompt, key)
            if prompt[-1]["role"] == "assistant":
                raise BadRow(
                    f"the last message is the assistant's; its text belongs into {self._keys.completion}, or the whole "
                    f"conversation into {self._keys.messages}"
                )
            text = self._render(prompt)
            ids = self.tokenizer.encode_text(text, add_special_tokens=False)
        else:
            if not isinstance(prompt, str):
                raise BadRow(f"{key} is a {type(prompt).__name__}, not text or messages")
            text = _check_text(key, prompt)
            ids = self.tokenizer.encode_text(text)
        if not ids:
            raise BadRow(f"{key} has no tokens")
        return EncodedPrompt(text, ids)

    def _encode_conversation(self, messages: Messages) -> EncodedPrompt:
        """A prompt whose earlier assistant turns, with their end-of-sequence tokens, are marked."""
        text = self._render(messages)
        spans = assistant_spans(messages, text, self._render)
        if spans is None:
            raise BadRow(
                "the chat template changes the text of earlier assistant turns, so they cannot be found again; give the "
                f"last turn alone, as {self._keys.prompt} and {self._keys.completion}"
            )
        ids, mask = self.tokenizer.encode_spans(text, spans)
        return EncodedPrompt(text, ids, _without_first(mask))

    def _encode_completion(self, completion: Any) -> tuple[int, ...] | None:
        """Ids with an end-of-sequence token at the end; ``None`` (also JSON null) if there is no completion."""
        if completion is None:
            return None
        key, eos_ids = self._keys.completion, self.tokenizer.eos_ids
        ids = self.tokenizer.encode_text(_check_text(key, completion), add_special_tokens=False)
        if not ids:
            raise BadRow(f"{key} has no tokens")
        if any(token_id in eos_ids for token_id in ids[:-1]):
            raise BadRow(f"{key} goes on after an end-of-sequence token")
        return ids if ids[-1] in eos_ids else (*ids, eos_ids[0])

    def _encode_teacher_prompt(self, prompt: Any) -> tuple[int, ...]:
        if prompt is None:
            return ()
        key = self._keys.teacher_prompt
        limit = self._limits.teacher_prompt or self._limits.prompt
        return self._fit(self._encode_prompt(prompt, key), limit, key, "data.max_teacher_prompt_length").ids

    def _fit(self, prompt: EncodedPrompt, limit: int, key: str, limit_key: str) -> EncodedPrompt:
        size = len(prompt.ids)
        if size <= limit:
            return prompt
        if self._limits.truncation == "error":
            raise OverlongRow(f"{key} has {size} tokens, more than {limit_key}={limit}")
        kept = slice(size - limit, size) if self._limits.truncation == "left" else slice(0, limit)
        return EncodedPrompt(prompt.text, prompt.ids[kept], _without_first(prompt.loss_mask[kept]))

    def _render(self, messages: Messages) -> str:
        try:
            return self.tokenizer.render_chat(messages)
        except MessagesRefused as error:
            raise BadRow(str(error)) from error


def _without_first(mask: tuple[bool, ...]) -> tuple[bool, ...]:
    """The flags, but for the first token, which nothing predicts; empty if no flag is left."""
    return (False, *mask[1:]) if any(mask[1:]) else ()


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow(f"{name} holds half of a surrogate pair, which is no character")
    return value


def _check_messages(messages: Any, key: str) -> None:
    if not isinstance(messages, list):
        raise BadRow(f"{key} is a {type(messages).__name__}, not a list of messages")
    if not messages:
        raise BadRow(f"{key} is empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise BadRow(f"message {index} is not an object with exactly the keys role and content")
        if message["role"] not in ROLES:
            raise BadRow(
                f"message {index} has the role {str(message['role'])[:40]!r}, not one of {', '.join(ROLES)}"
            )
        _check_text(f"content of message {index}", message["content"])
