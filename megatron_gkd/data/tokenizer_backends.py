"""Hugging Face and SentencePiece tokenizers behind one interface."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]  # [start, stop) in characters

CHAT_TEMPLATE_FILE = "chat_template.jinja"


class TokenizerBackend(Protocol):
    """Interface between ``Tokenizer`` and a tokenizer library."""

    vocab: dict[str, int]
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return token ids; special tokens written in the text are recognized."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Return token ids without added special tokens, and the span of each."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        ...

    def render(self, messages: Messages) -> str:
        """Render messages with ``chat_template``, up to the start of the assistant's turn."""
        ...


class HfBackend(TokenizerBackend):
    """A tokenizer from transformers.

    Args:
        hf_tokenizer: A ``PreTrainedTokenizerBase``.
        chat_template: Replaces the tokenizer's own template.
    """

    def __init__(self, hf_tokenizer: Any, chat_template: str | None = None) -> None:
        self._hf = hf_tokenizer
        self.vocab: dict[str, int] = hf_tokenizer.get_vocab()
        self.eos_id: int | None = hf_tokenizer.eos_token_id
        self.pad_id: int | None = hf_tokenizer.pad_token_id
        self.chat_template: str | None = chat_template or hf_tokenizer.chat_template

    @override
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._hf.encode(text, add_special_tokens=add_special_tokens)

    @override
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        encoded = self._hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    @override
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        # The clean-up drops spaces before punctuation, so the text would not encode to the same ids.
        return self._hf.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    @override
    def render(self, messages: Messages) -> str:
        return self._hf.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )


class SentencePieceBackend(TokenizerBackend):
    """A SentencePiece model file.

    Prompts begin with the model's beginning-of-sequence token, if it has one. Control symbols written in a text are
    recognized.

    Args:
        model_file: The model, such as ``tokenizer.model``.
        chat_template: Jinja template; ``None``: chat messages cannot be rendered.
    """

    def __init__(self, model_file: Path, chat_template: str | None = None) -> None:
        import sentencepiece

        load: Any = sentencepiece.SentencePieceProcessor
        # Two processors, because the normalizer is a property of the model: Llama-type models put a space before every
        # text they encode, right at the start of a prompt and wrong after other tokens (completions, chat turns).
        self._start, self._further = load(model_file=str(model_file)), load(model_file=str(model_file))
        self._further.override_normalizer_spec(add_dummy_prefix=False, remove_extra_whitespaces=False)
        self.vocab = {self._start.id_to_piece(i): i for i in range(self._start.vocab_size())}
        self._bos_id = _known(self._start.bos_id())
        self.eos_id, self.pad_id = _known(self._start.eos_id()), _known(self._start.pad_id())
        self.chat_template = chat_template
        self._specials = _control_symbols(self._start)
        longest_first = sorted(self._specials, key=len, reverse=True)
        anywhere = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) never matches
        self._split = re.compile(f"({anywhere})")

    @override
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids, _ = self._encode(text, self._start if add_special_tokens else self._further)
        return [self._bos_id, *ids] if add_special_tokens and self._bos_id is not None else ids

    @override
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        return self._encode(text, self._further)

    @override
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        specials = set(self._specials.values())
        # SentencePiece decodes control symbols to nothing, so runs between them are decoded on their own. Only the first
        # run loses the leading space that encoding a prompt has added.
        parts, model = [], self._start
        for is_special, run in itertools.groupby(ids, specials.__contains__):
            if not is_special:
                parts.append(model.decode(list(run)))
            elif not skip_special_tokens:
                parts += map(self._start.id_to_piece, run)
            model = self._further
        return "".join(parts)

    @override
    def render(self, messages: Messages) -> str:
        # The sandboxed environment of transformers: templates come with downloaded models.
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            bos_token=self._piece(self._bos_id),
            eos_token=self._piece(self.eos_id),
        )
        texts, _ = rendered
        return texts[0]

    def _piece(self, token_id: int | None) -> str:
        return "" if token_id is None else self._start.id_to_piece(token_id)

    def _encode(self, text: str, first: Any) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        position = 0
        for part in self._split.split(text):
            if part in self._specials:
                ids.append(self._specials[part])
                spans.append((position, position + len(part)))
            elif part:
                model = first if position == 0 else self._further
                for piece in model.encode(part, out_type="immutable_proto").pieces:
                    ids.append(piece.id)
                    spans.append((position + piece.begin, position + piece.end))
            position += len(part)
        return ids, spans


def folder_template(folder: Path) -> str | None:
    """Return the chat template stored next to the tokenizer of a model folder, if any."""
    template = folder / CHAT_TEMPLATE_FILE
    if template.is_file():
        return template.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None


def _known(token_id: int) -> int | None:
    # SentencePiece returns -1 for a special token that the model does not have.
    return None if token_id < 0 else token_id


def _control_symbols(model: Any) -> dict[str, int]:
    return {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
