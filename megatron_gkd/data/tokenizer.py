"""The tokenizer of a model folder, read from local files only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer


class DataError(ValueError):
    """A tokenizer folder or a prompt file cannot be used as it is."""


class MessagesRefused(ValueError):
    """The chat template does not accept these messages (say, two user turns in a row)."""


class Tokenizer:
    """What the program needs of a Hugging Face tokenizer.

    Attributes:
        folder: Where it was read.
        eos_ids: All ids that end a sequence. The first is the tokenizer's own and ends completions from data;
            the others come from ``generation_config.json``.
        pad_id: Token of the padding; the first end-of-sequence id if the tokenizer has none (padding is masked).
        vocab_size: Largest id + 1. A model's embedding may have more rows.

    Raises:
        DataError: No end-of-sequence token is known, or one lies outside the vocabulary.
    """

    def __init__(self, hf_tokenizer: Any, folder: Path) -> None:
        self._hf = hf_tokenizer
        self.folder = folder
        self.vocab: dict[str, int] = hf_tokenizer.get_vocab()
        self.vocab_size: int = max(self.vocab.values()) + 1
        self.eos_ids: tuple[int, ...] = self._find_eos_ids()
        pad_id = hf_tokenizer.pad_token_id
        self.pad_id: int = self.eos_ids[0] if pad_id is None else pad_id

    def _find_eos_ids(self) -> tuple[int, ...]:
        own = [] if self._hf.eos_token_id is None else [self._hf.eos_token_id]
        ids = tuple(dict.fromkeys([*own, *_generation_eos_ids(self.folder)]))
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
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can work."""
        return self._hf.chat_template is not None

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text.

        Args:
            text: Prompt given as text, rendered chat, or completion.
            add_special_tokens: True for a prompt given as text: it gets what the tokenizer's default adds (a
                beginning-of-sequence token, or nothing). False for completions and for rendered chats, whose
                template writes its special tokens itself.

        Raises:
            DataError: The default would *end* the prompt with an end-of-sequence token.
        """
        ids = tuple(self._hf.encode(text, add_special_tokens=add_special_tokens))
        if add_special_tokens and ids and ids[-1] in self.eos_ids and not self._is_eos_in(text):
            raise DataError(
                f"the tokenizer of {self.folder} appends the end-of-sequence token {ids[-1]} to prompts, so nothing "
                "would be generated; set add_eos_token to false in tokenizer_config.json or give chat messages"
            )
        return ids

    def _is_eos_in(self, text: str) -> bool:
        plain = self._hf.encode(text, add_special_tokens=False)
        return bool(plain) and plain[-1] in self.eos_ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that the model's chat template makes of the messages, up to where the assistant begins.

        Encode it with ``add_special_tokens=False``.

        Raises:
            DataError: The folder has no chat template.
            MessagesRefused: The template raised an error for these messages.
        """
        if not self.has_chat_template:
            raise DataError(
                f"{self.folder} has no chat template, but the prompts are chat messages; add chat_template.jinja "
                "(or the key chat_template in tokenizer_config.json), use the Instruct model's tokenizer files, or "
                "write the prompts as text"
            )
        try:
            return self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise MessagesRefused(f"the chat template refuses the messages: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; special tokens are shown unless told otherwise."""
        return self._hf.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def stop_token_ids(self, stop: Sequence[str]) -> tuple[int, ...]:
        """The token id of each stop string, because engines here see ids, never text.

        A stop string that occurs only inside a longer token does not stop.

        Raises:
            DataError: A string is not exactly one token of this tokenizer.
        """
        return tuple(self._stop_token_id(text) for text in stop)

    def _stop_token_id(self, text: str) -> int:
        ids = [self.vocab[text]] if text in self.vocab else self._hf.encode(text, add_special_tokens=False)
        if len(ids) != 1 or self.decode(ids) != text:
            tokens = [self.decode([token_id]) for token_id in ids]
            raise DataError(
                f"rollout.stop: {text!r} is not one token of {self.folder} but {tokens}; stop strings must be single "
                "tokens of the tokenizer"
            )
        return ids[0]


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer of a Hugging Face model folder; nothing is downloaded and no code of the folder runs.

    Raises:
        DataError: The folder is missing or holds no usable tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"tokenizer folder {folder} does not exist")
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"no usable tokenizer in {folder}; copy the model's tokenizer.json and tokenizer_config.json into it "
            f"(transformers: {error})"
        ) from error
    return Tokenizer(hf_tokenizer, folder)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of the pairs (id, token) in the order of ids: equal if and only if all ids mean the same."""
    pairs = sorted((token_id, token) for token, token_id in tokenizer.vocab.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def require_same_vocabulary(student: Tokenizer, teacher: Tokenizer) -> None:
    """Refuse two tokenizers whose ids do not mean the same tokens.

    Raises:
        DataError: Names both folders, the sizes and the first ids that differ.
    """
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
