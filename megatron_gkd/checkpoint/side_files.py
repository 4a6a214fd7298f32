"""Side files of a model folder: configuration, tokenizer and chat template."""

import shutil
from pathlib import Path

from megatron_gkd.data.tokenizer import SENTENCEPIECE_FILE
from megatron_gkd.data.tokenizer_backends import CHAT_TEMPLATE_FILE

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE_FILE,
    CHAT_TEMPLATE_FILE,
)
_MODEL_FILES = ("config.json", "generation_config.json")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template of a Hugging Face folder."""
    target.mkdir(parents=True, exist_ok=True)
    # An allow-list: model folders also hold weights in other formats, code, optimizer states and whatever users put
    # there, none of which belongs into every checkpoint and export.
    for name in (*_MODEL_FILES, *_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def replace_tokenizer(target: Path, tokenizer: Path | None, chat_template: str | None) -> None:
    """Replace the model's tokenizer or chat template by the one that the run used.

    Args:
        target: Folder filled by ``copy_side_files``.
        tokenizer: Tokenizer folder or SentencePiece model file; ``None`` keeps the model's own.
        chat_template: Jinja source; ``None`` keeps the tokenizer's own.
    """
    if tokenizer is not None:
        # All of the old files: transformers would combine, say, the old merges.txt with the new vocab.json.
        for name in _TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
        is_file = tokenizer.is_file()
        for name in (SENTENCEPIECE_FILE,) if is_file else _TOKENIZER_FILES:
            file = tokenizer if is_file else tokenizer / name
            if file.is_file():
                shutil.copyfile(file, target / name)
    if chat_template is not None:
        (target / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
