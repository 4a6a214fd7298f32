"""A model folder with a word tokenizer of a few ids, built by hand."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers, processors

from megatron_gkd.data.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "<pad>", "<bos>", "<eos>", "<eot>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(20)]
# like Llama's templates: writes its own beginning of sequence and wants user and assistant in turn
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eot>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(
    folder: Path,
    *,
    words=WORDS,
    chat_template=CHAT_TEMPLATE,
    eos="<eos>",
    pad="<pad>",
    generation_eos=None,
    appends_eos=False,
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and, with ``generation_eos``, generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = WordTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if appends_eos else "<bos> $A",
        special_tokens=[("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": "<unk>",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation_eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    return folder


@pytest.fixture
def make_tokenizer(tmp_path):
    """make_tokenizer(name="model", **options of write_tokenizer) -> Tokenizer."""
    return lambda name="model", **options: load_tokenizer(write_tokenizer(tmp_path / name, **options))


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()
