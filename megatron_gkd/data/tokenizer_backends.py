"""Two libraries behind one interface: Hugging Face tokenizers and SentencePiece models."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]
"""[start, stop) in characters."""

CHAT_TEMPLATE_FILE = "chat_template.jinja"


class TokenizerBackend(Protocol):
    """What ``Tokenizer`` needs of a library."""

    vocab: dict[str, int]
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; texts of special tokens become those tokens."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids without added special tokens, and the characters that each stands for."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""
        ...

    def render(self, messages: Messages) -> str:
        """What ``chat_template`` makes of the messages, up to where the assistant begins."""
        ...


class HfBackend:
    """A tokenizer of transformers.

    Args:
        hf_tokenizer: A ``PreTrainedTokenizerBase``.
        chat_template: In place of its own.
    """

    def __init__(self, hf_tokenizer: Any, chat_template: str | None = None) -> None:
        self._hf = hf_tokenizer
        self.vocab: dict[str, int] = hf_tokenizer.get_vocab()
        self.eos_id: int | None = hf_tokenizer.eos_token_id
        self.pad_id: int | None = hf_tokenizer.pad_token_id
        self.chat_template: str | None = chat_template or hf_tokenizer.chat_template

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See ``TokenizerBackend``."""
        return self._hf.encode(text, add_special_tokens=add_special_tokens)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """See ``TokenizerBackend``."""
        encoded = self._hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """See ``TokenizerBackend``."""
        return self._hf.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def render(self, messages: Messages) -> str:
        """See ``TokenizerBackend``."""
        return self._hf.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )


class SentencePieceBackend:
    """A SentencePiece model file.

    Prompts begin with the model's beginning-of-sequence token, if it has one. Control symbols in a text become their
    tokens. The space that a model puts before a text is put before prompts only: what follows other tokens gets none.

    Args:
        model_file: The model, such as ``tokenizer.model``.
        chat_template: Jinja template; ``None``: chat messages cannot be rendered.
    """

    def __init__(self, model_file: Path, chat_template: str | None = None) -> None:
        import sentencepiece

        load: Any = sentencepiece.SentencePieceProcessor
        self._start, self._further = load(model_file=str(model_file)), load(model_file=str(model_file))
        self._further.override_normalizer_spec(add_dummy_prefix=False, remove_extra_whitespaces=False)
        self.vocab = {self._start.id_to_piece(i): i for i in range(self._start.vocab_size())}
        self._bos_id = _known(self._start.bos_id())
        self.eos_id, self.pad_id = _known(self._start.eos_id()), _known(self._start.pad_id())
        self.chat_template = chat_template
        self._specials = _control_symbols(self._start)
        longest_first = sorted(self._specials, key=len, reverse=True)
        anywhere = "|".join(map(re.escape, longest_first)) or "(?!)"  # nowhere
        self._split = re.compile(f"({anywhere})")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See ``TokenizerBackend``."""
        ids, _ = self._encode(text, self._start if add_special_tokens else self._further)
        return [self._bos_id, *ids] if add_special_tokens and self._bos_id is not None else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """See ``TokenizerBackend``."""
        return self._encode(text, self._further)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """See ``TokenizerBackend``."""
        specials = set(self._specials.values())
        parts, model = [], self._start
        for is_special, run in itertools.groupby(ids, specials.__contains__):
            if not is_special:
                parts.append(model.decode(list(run)))
            elif not skip_special_tokens:
                parts += map(self._start.id_to_piece, run)
            model = self._further
        return "".join(parts)

    def render(self, messages: Messages) -> str:
        """See ``TokenizerBackend``."""
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
    """The chat template that a model folder holds beside its tokenizer, if any."""
    template = folder / CHAT_TEMPLATE_FILE
    if template.is_file():
        return template.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None


def _known(token_id: int) -> int | None:
    """SentencePiece says -1 for a token that a model does not have."""
    return None if token_id < 0 else token_id


def _control_symbols(model: Any) -> dict[str, int]:
    return {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
