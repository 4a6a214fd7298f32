"""Where the assistant's turns lie in the text that a chat template makes of a conversation."""

import re
from collections.abc import Callable, Sequence

Message = dict[str, str]


def assistant_spans(
    messages: Sequence[Message], text: str, render: Callable[[list[Message]], str]
) -> list[tuple[int, int]] | None:
    """[start, stop) of the content of each assistant message in ``text``, in order.

    The template is asked again with a placeholder in each of these places, because the content itself may occur
    elsewhere in the text, and because rendering only a beginning of the conversation is another text for templates that
    treat the last turn in a special way.

    Args:
        messages: The conversation.
        text: ``render(messages)``.
        render: The chat template.

    Returns:
        ``None`` if the template does not reproduce the contents, as they are or without surrounding white space.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return []
    marked = [
        {**message, "content": _placeholder(i)} if i in turns else message
        for i, message in enumerate(messages)
    ]
    pieces = re.split("|".join(map(_placeholder, turns)), render(marked))
    if len(pieces) != len(turns) + 1:
        return None
    contents = [messages[i]["content"] for i in turns]
    for candidates in (contents, [content.strip() for content in contents]):
        spans = _place(pieces, candidates, text)
        if spans is not None:
            return spans
    return None


def _place(pieces: Sequence[str], contents: Sequence[str], text: str) -> list[tuple[int, int]] | None:
    """Spans of the contents between the pieces, if together they are the text."""
    rebuilt, spans = pieces[0], []
    for content, piece in zip(contents, pieces[1:], strict=True):
        spans.append((len(rebuilt), len(rebuilt) + len(content)))
        rebuilt += content + piece
    return spans if rebuilt == text else None


def _placeholder(index: int) -> str:
    """Text of private-use characters, which no conversation holds."""
    return f"\ue0f0{index}\ue0f1"
