"""One line of the prompt file: bytes to token ids, or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gkd.data.tokenizer import MessagesRefused, Tokenizer

MAX_LINE_BYTES = 8 * 1024 * 1024
"""A longer line is a bad row; it is skipped without being held in memory."""
ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRow(Exception):
    """Why a row cannot be used."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; of a line that is too long only the beginning."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield number, line
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        BadRow: Too long, not UTF-8, not JSON, or not an object.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    except ValueError as error:  # broken JSON, or a number with thousands of digits
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow(f"a JSON {type(row).__name__}, not an object with the key prompt")
    return row


def encode_prompt(prompt: Any, tokenizer: Tokenizer) -> tuple[str, tuple[int, ...]]:
    """A row's prompt as the model sees it, and its ids.

    Raises:
        BadRow: Missing, empty, of a wrong type, or messages that the chat template refuses.
        DataError: The tokenizer cannot encode any row of this kind (no chat template).
    """
    if isinstance(prompt, list):
        _check_messages(prompt)
        try:
            text = tokenizer.render_chat(prompt)
        except MessagesRefused as error:
            raise BadRow(str(error)) from error
        ids = tokenizer.encode_text(text, add_special_tokens=False)
    else:
        text = _check_text("prompt", prompt)
        ids = tokenizer.encode_text(text)
    if not ids:
        raise BadRow("prompt has no tokens")
    return text, ids


def encode_completion(completion: Any, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """Ids of a row's completion with an end-of-sequence token at the end; ``None`` (also JSON null) if it has none.

    Raises:
        BadRow: Empty, not text, or going on after an end-of-sequence token.
    """
    if completion is None:
        return None
    ids = tokenizer.encode_text(_check_text("completion", completion), add_special_tokens=False)
    if not ids:
        raise BadRow("completion has no tokens")
    if any(token_id in tokenizer.eos_ids for token_id in ids[:-1]):
        raise BadRow("completion goes on after an end-of-sequence token")
    return ids if ids[-1] in tokenizer.eos_ids else (*ids, tokenizer.eos_ids[0])


def _check_text(name: str, value: Any) -> str:
    if value is None:
        raise BadRow(f"no {name}")
    if not isinstance(value, str):
        raise BadRow(
            f"{name} is a {type(value).__name__}, not text{' or messages' if name == 'prompt' else ''}"
        )
    if not value.strip():
        raise BadRow(f"{name} is empty")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRow(f"{name} holds half of a surrogate pair, which is no character")
    return value


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise BadRow("prompt is empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise BadRow(f"message {index} is not an object with exactly the keys role and content")
        if message["role"] not in ROLES:
            raise BadRow(
                f"message {index} has the role {str(message['role'])[:40]!r}, not one of {', '.join(ROLES)}"
            )
        _check_text(f"content of message {index}", message["content"])
    if messages[-1]["role"] == "assistant":
        raise BadRow("the last message is the assistant's; its text belongs into completion")
