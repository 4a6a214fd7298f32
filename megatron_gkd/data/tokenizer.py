"""Tokenizers loaded from local files, and the comparison of their vocabularies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
from transformers import AutoTokenizer

from megatron_gkd.data.tokenizer_backends import (
    HfBackend,
    SentencePieceBackend,
    TokenizerBackend,
    folder_template,
)

SENTENCEPIECE_FILE = "tokenizer.model"


class DataError(ValueError):
    """Unusable tokenizer files or prompt files."""


class MessagesRefused(ValueError):
    """Messages rejected by the chat template, such as two user turns in a row."""


class Tokenizer:
    """A Hugging Face or SentencePiece tokenizer with its chat template and end-of-sequence ids.

    Attributes:
        folder: The model folder or SentencePiece file.
        eos_ids: All ids that end a sequence. The first is the tokenizer's own and ends completions from the dataset;
            the others come from ``generation_config.json``.
        pad_id: Padding token; the first end-of-sequence id if the tokenizer has none (padding is masked).
        vocab_size: Largest id + 1. A model's embedding may have more rows.

    Raises:
        DataError: The end-of-sequence token is unknown or outside the vocabulary.
    """

    def __init__(self, backend: TokenizerBackend, folder: Path) -> None:
        self._backend = backend
        self.folder = folder
        self.vocab: dict[str, int] = backend.vocab
        # Not len(vocab): ids may have gaps where tokens were added at fixed ids.
        self.vocab_size: int = max(self.vocab.values()) + 1
        self.eos_ids: tuple[int, ...] = self._find_eos_ids()
        self.pad_id: int = self.eos_ids[0] if backend.pad_id is None else backend.pad_id

    def _find_eos_ids(self) -> tuple[int, ...]:
        # Chat models end turns with a token that only generation_config.json lists: Llama 3 has <|eot_id|> there,
        # beside its <|end_of_text|>. dict.fromkeys keeps the order and drops duplicates.
        own = [] if self._backend.eos_id is None else [self._backend.eos_id]
        folder = self.folder.parent if self.folder.is_file() else self.folder
        ids = tuple(dict.fromkeys([*own, *_generation_eos_ids(folder)]))
        if not ids:
            raise DataError(
                f"no end-of-sequence token in {self.folder}: completions would never end; set eos_token in "
                "tokenizer_config.json or eos_token_id in generation_config.json"
            )
        if any(not 0 <= token_id < self.vocab_size for token_id in ids):
            raise DataError(
                f"end-of-sequence ids {ids} of {self.folder} do not all lie in its vocabulary of {self.vocab_size}; "
                "correct eos_token_id in generation_config.json"
            )
        return ids

    @property
    def chat_template(self) -> str | None:
        """The Jinja source used by ``render_chat``."""
        return self._backend.chat_template

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` is available."""
        return self.chat_template is not None

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the token ids of a text.

        Args:
            text: Plain-text prompt, rendered chat, or completion.
            add_special_tokens: True for plain-text prompts: adds the tokenizer's defaults (a beginning-of-sequence
                token, or nothing). False for completions and for rendered chats, whose template writes its own.

        Raises:
            DataError: The defaults append an end-of-sequence token to the prompt.
        """
        ids = tuple(self._backend.encode(text, add_special_tokens=add_special_tokens))
        if add_special_tokens and ids and ids[-1] in self.eos_ids and not self._is_eos_in(text):
            raise DataError(
                f"the tokenizer of {self.folder} appends the end-of-sequence token {ids[-1]} to prompts, so nothing "
                "would be generated; set add_eos_token to false in tokenizer_config.json or give chat messages"
            )
        return ids

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Encode a rendered chat and flag the tokens inside the given spans.

        Args:
            text: The rendered chat; ids are those of ``encode_text`` without special tokens.
            spans: [start, stop) in characters.

        Returns:
            (ids, flags): a token is flagged if it covers at least one character of a span, or if it is an
            end-of-sequence token that begins where a span ends.

        Raises:
            DataError: The tokenizer does not provide offsets.
        """
        try:
            ids, offsets = self._backend.encode_with_offsets(text)
        except NotImplementedError as error:
            raise DataError(
                f"the tokenizer of {self.folder} does not provide character offsets, so the assistant's turns of "
                "conversations cannot be located; add its tokenizer.json"
            ) from error

        inside = bytearray(len(text) + 1)
        for start, stop in spans:
            inside[start:stop] = b"\1" * (stop - start)
        stops = {stop for _, stop in spans}
        flags = [
            any(inside[start:stop]) or (token_id in self.eos_ids and start in stops)
            for token_id, (start, stop) in zip(ids, offsets, strict=True)
        ]
        return tuple(ids), tuple(flags)

    def _is_eos_in(self, text: str) -> bool:
        plain = self._backend.encode(text, add_special_tokens=False)
        return bool(plain) and plain[-1] in self.eos_ids

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Render messages with the chat template, up to the start of the assistant's turn.

        Encode the result with ``add_special_tokens=False``.

        Raises:
            DataError: There is no chat template, or it is not valid Jinja.
            MessagesRefused: The template raised an error for these messages.
        """
        if not self.has_chat_template:
            raise DataError(
                f"{self.folder} has no chat template, but the prompts are chat messages; add chat_template.jinja "
                "(or the key chat_template in tokenizer_config.json), set data.chat_template, use the Instruct model's "
                "tokenizer files, or write the prompts as text"
            )
        try:
            return self._backend.render(messages)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"line {error.lineno} of the chat template of {self.folder} is not valid Jinja: {error.message}; correct "
                "the template (data.chat_template, or the model's own)"
            ) from error
        except jinja2.TemplateError as error:  # after its subclass above: raise_exception() in a template
            raise MessagesRefused(f"the chat template rejects the messages: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids, by default with special tokens."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stop_token_ids(self, stop: Sequence[str]) -> tuple[int, ...]:
        """Return the token id of each stop string.

        A stop string inside a longer token does not stop generation.

        Raises:
            DataError: A string is not exactly one token of this tokenizer.
        """
        # SGLang runs with --skip-tokenizer-init: it exchanges ids only and cannot match strings.
        return tuple(self._stop_token_id(text) for text in stop)

    def _stop_token_id(self, text: str) -> int:
        ids = (
            [self.vocab[text]] if text in self.vocab else self._backend.encode(text, add_special_tokens=False)
        )
        # The second condition catches the unknown token, which is one id for any unknown word.
        if len(ids) != 1 or self.decode(ids) != text:
            tokens = [self.decode([token_id]) for token_id in ids]
            raise DataError(
                f"rollout.stop: {text!r} is not one token of {self.folder} but {tokens}; stop strings must be single "
                "tokens of the tokenizer"
            )
        return ids[0]


def load_tokenizer(
    source: Path | str,
    kind: Literal["auto", "hf", "sentencepiece"] = "auto",
    *,
    chat_template: str | None = None,
) -> Tokenizer:
    """Load a tokenizer from local files, without downloads or remote code.

    Args:
        source: A Hugging Face model folder, or a SentencePiece model file (or a folder with ``tokenizer.model``).
        kind: ``auto`` prefers ``tokenizer.json`` and ``tokenizer_config.json`` to ``tokenizer.model``.
        chat_template: Jinja source that replaces the tokenizer's own template.

    Raises:
        DataError: The source is missing or not a usable tokenizer.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"tokenizer {source} does not exist")
    if kind == "auto":
        has_hf_files = any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        is_model = source.is_file() or (source / SENTENCEPIECE_FILE).is_file()
        kind = "sentencepiece" if is_model and not has_hf_files else "hf"
    load = _load_sentencepiece if kind == "sentencepiece" else _load_hf
    return Tokenizer(load(source, chat_template), source)


def _load_hf(folder: Path, chat_template: str | None) -> TokenizerBackend:
    try:
        # use_fast: only the Rust tokenizers give character offsets.
        hf_tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"no usable tokenizer in {folder}; copy the model's tokenizer.json and tokenizer_config.json into it "
            f"(transformers: {error})"
        ) from error
    return HfBackend(hf_tokenizer, chat_template)


def _load_sentencepiece(source: Path, chat_template: str | None) -> TokenizerBackend:
    file = source / SENTENCEPIECE_FILE if source.is_dir() else source
    try:
        return SentencePieceBackend(file, chat_template or folder_template(file.parent))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{file} is not a usable SentencePiece model: {error}; give the file that SentencePiece's trainer wrote, or "
            "set data.tokenizer_kind: hf"
        ) from error


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 (hex) of all (id, token) pairs, sorted by id."""
    pairs = sorted((token_id, token) for token, token_id in tokenizer.vocab.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def require_same_vocabulary(student: Tokenizer, teacher: Tokenizer) -> None:
    """Check that equal ids are equal tokens in both tokenizers.

    Raises:
        DataError: Lists both folders, the sizes and the first ids that differ.
    """
    # Equal sizes prove nothing: models of one family may share a size and differ in their added tokens.
    if tokenizer_fingerprint(student) == tokenizer_fingerprint(teacher):
        return
    pairs = set(student.vocab.items()) ^ set(teacher.vocab.items())
    first = sorted({token_id for _, token_id in pairs})[:3]
    examples = "; ".join(f"id {i}: {_name(student, i)} and {_name(teacher, i)}" for i in first)
    raise DataError(
        f"the tokenizers of student {student.folder} ({student.vocab_size} ids) and teacher {teacher.folder} "
        f"({teacher.vocab_size} ids) differ ({examples}); distillation compares probabilities id by id, so use two "
        "models with one tokenizer"
    )


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    return next((repr(token) for token, other in tokenizer.vocab.items() if other == token_id), "nothing")


def _generation_eos_ids(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise DataError(f"eos_token_id in {path} is {value!r}; it must be a token id or a list of them")
    return ids
