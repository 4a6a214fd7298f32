"""Tokenization of single rows: prompts, completions, chat messages and whole conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.tokenizer import MessagesRefused, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, str]]


class BadRow(Exception):
    """A row that cannot be used, with the reason."""


class OverlongRow(Exception):
    """A row with a part that exceeds its token limit."""


class RowKeys(NamedTuple):
    """Column names."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    teacher_prompt: str = "teacher_prompt"


DEFAULT_KEYS = RowKeys()


@dataclass(frozen=True)
class RowLimits:
    """Maximum lengths of the parts of a row, in tokens.

    Attributes:
        prompt: Of the prompt.
        teacher_prompt: Of the teacher's prompt; ``None``: as ``prompt``.
        completion: Of the completion, including its end-of-sequence token; ``None``: no limit. Never truncated.
        truncation: Reject longer prompts (error), or drop tokens from their beginning (left) or end (right).
    """

    prompt: int
    teacher_prompt: int | None = None
    completion: int | None = None
    truncation: Literal["error", "left", "right"] = "error"


class EncodedPrompt(NamedTuple):
    """Text and token ids of a prompt."""

    text: str
    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...] = ()  # True for tokens of earlier assistant turns; empty if there are none


class RowEncoder:
    """Converts rows to ``Prompt``.

    Text prompts get the tokenizer's default special tokens, chat messages are rendered by its chat template, and
    completions get no special token except a final end-of-sequence token.

    Args:
        tokenizer: Tokenizer of the student.
        limits: Maximum lengths.
        keys: Column names.
    """

    def __init__(self, tokenizer: Tokenizer, limits: RowLimits, keys: RowKeys = DEFAULT_KEYS):
        self.tokenizer, self._limits, self._keys = tokenizer, limits, keys

    def encode(self, row: Mapping[str, Any], *, number: int, file: int = 0) -> Prompt:
        """Encode one row.

        Args:
            row: Values by column name.
            number: Line or row number in the file, from 1.
            file: Index of the file in the list of files.

        Raises:
            BadRow: A value is missing, empty, of a wrong type, or rejected by the chat template.
            OverlongRow: A part exceeds its limit.
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
            # With a prompt of its own the teacher scores the completion only: it has no logits for earlier turns.
            loss_mask=() if teacher_ids else prompt.loss_mask,
            teacher_ids=teacher_ids,
        )

    def unused_keys(self, row: Mapping[str, Any]) -> set[str]:
        """Return the columns of the row that ``encode`` ignores."""
        used = set(self._keys)
        if row.get(self._keys.prompt) is not None:
            used.discard(self._keys.messages)  # a prompt takes precedence over a conversation
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
            raise BadRow(f"{keys.messages} begin with the assistant's turn; there is no prompt before it")
        return self._encode_conversation(messages[:-1]), messages[-1]["content"]

    def _encode_prompt(self, prompt: Any, key: str) -> EncodedPrompt:
        if isinstance(prompt, list):
            _check_messages(prompt, key)
            if prompt[-1]["role"] == "assistant":
                raise BadRow(
                    f"the last message is the assistant's; put its text into {self._keys.completion}, or the whole "
                    f"conversation into {self._keys.messages}"
                )
            text = self._render(prompt)
            # Templates write BOS themselves; adding the defaults would double it.
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
        """Encode a conversation; earlier assistant turns and their end-of-sequence tokens count in the loss."""
        text = self._render(messages)
        spans = assistant_spans(messages, text, self._render)
        if spans is None:
            raise BadRow(
                "the chat template changes the text of earlier assistant turns, so their tokens cannot be located; give "
                f"the last turn alone, as {self._keys.prompt} and {self._keys.completion}"
            )
        ids, mask = self.tokenizer.encode_spans(text, spans)
        return EncodedPrompt(text, ids, _without_first(mask))

    def _encode_completion(self, completion: Any) -> tuple[int, ...] | None:
        """Return ids ending with an end-of-sequence token, or ``None`` without a completion."""
        if completion is None:
            return None
        key, eos_ids = self._keys.completion, self.tokenizer.eos_ids
        ids = self.tokenizer.encode_text(_check_text(key, completion), add_special_tokens=False)
        if not ids:
            raise BadRow(f"{key} has no tokens")
        # Generation would have stopped there: the student never sees what follows.
        if any(token_id in eos_ids for token_id in ids[:-1]):
            raise BadRow(f"{key} continues after an end-of-sequence token")
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


def assistant_spans(
    messages: Sequence[Mapping[str, str]], text: str, render: Callable[[Messages], str]
) -> list[tuple[int, int]] | None:
    """Locate the content of each assistant message in the rendered conversation.

    Args:
        messages: The conversation.
        text: ``render(messages)``.
        render: The chat template.

    Returns:
        [start, stop) in characters of ``text`` per assistant message, in order. ``None`` if the template reproduces the
        contents neither verbatim nor stripped of surrounding white space.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    # Rendered once more with placeholders: searching for the content would also find it in other turns, and rendering
    # a prefix of the conversation differs for templates that treat the last turn specially (Qwen3 drops the thinking
    # of all turns but the last).
    marked = [
        {**message, "content": _placeholder(i)} if i in turns else dict(message)
        for i, message in enumerate(messages)
    ]
    pieces = re.split("|".join(map(_placeholder, turns)), render(marked))
    if len(pieces) != len(turns) + 1:
        return None
    contents = [messages[i]["content"] for i in turns]
    for candidates in (contents, [content.strip() for content in contents]):
        spans = _spans_between(pieces, candidates, text)
        if spans is not None:
            return spans
    return None


def _spans_between(pieces: Sequence[str], contents: Sequence[str], text: str) -> list[tuple[int, int]] | None:
    """Return the spans of ``contents`` if interleaved with ``pieces`` they equal ``text``."""
    rebuilt, spans = pieces[0], []
    for content, piece in zip(contents, pieces[1:], strict=True):
        spans.append((len(rebuilt), len(rebuilt) + len(content)))
        rebuilt += content + piece
    return spans if rebuilt == text else None


def _placeholder(index: int) -> str:
    # Private-use characters: no conversation contains them, and no template strips them as white space.
    return f"\ue0f0{index}\ue0f1"


def _without_first(mask: tuple[bool, ...]) -> tuple[bool, ...]:
    # No position predicts the first token, so it cannot carry a loss.
    return (False, *mask[1:]) if any(mask[1:]) else ()


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    # json.loads accepts a lone surrogate such as "\ud83d"; it has no UTF-8 form, and tokenizers would raise.
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow(f"{name} contains an unpaired surrogate, which is not a character")
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
            # [:40]: the value comes from the file and may be of any length
            raise BadRow(
                f"message {index} has the role {str(message['role'])[:40]!r}, not one of {', '.join(ROLES)}"
            )
        _check_text(f"content of message {index}", message["content"])
