"""What a model folder holds beside weights: configuration, tokenizer and chat template."""

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
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and chat template of a Hugging Face folder: every file that holds no weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)


def replace_tokenizer(target: Path, tokenizer: Path | None, chat_template: str | None) -> None:
    """Put the tokenizer or the chat template that a run used in the place of the model's own.

    Args:
        target: Folder that ``copy_side_files`` filled.
        tokenizer: Folder of the tokenizer or a SentencePiece model file; ``None``: the model's own stays.
        chat_template: Jinja text; ``None``: the tokenizer's own stays.
    """
    if tokenizer is not None:
        for name in _TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
        is_file = tokenizer.is_file()
        for name in (SENTENCEPIECE_FILE,) if is_file else _TOKENIZER_FILES:
            file = tokenizer if is_file else tokenizer / name
            if file.is_file():
                shutil.copyfile(file, target / name)
    if chat_template is not None:
        (target / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
