"""A SentencePiece model trained here, behind the same interface as Hugging Face tokenizers."""

import json

import pytest
import sentencepiece

from megatron_gkd.data.rows import RowEncoder, RowLimits
from megatron_gkd.data.tokenizer import DataError, load_tokenizer, require_same_vocabulary
from tests.unit.data.conftest import write_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train(folder, **options):
    folder.mkdir()
    sentences = [f"say {i} twice and {i * 7} times, the cat sat on the mat" for i in range(200)]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
            sentence_iterator=iter(sentences),
            model_writer=file,
            minloglevel=2,
            **{
                "vocab_size": 80,
                "model_type": "bpe",
                "pad_id": 3,
                "user_defined_symbols": ["<user>", "<assistant>"],
                **options,
            },
        )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = train(tmp_path_factory.mktemp("sp") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def spm(folder):
    return load_tokenizer(folder)


def pieces(tokenizer, ids) -> list[str]:
    names = {token_id: piece for piece, token_id in tokenizer.vocab.items()}
    return [names[token_id] for token_id in ids]


def test_special_ids_and_sizes_are_the_models(spm):
    assert (spm.eos_ids, spm.pad_id, spm.vocab_size) == ((2,), 3, 80)
    assert spm.has_chat_template


def test_a_prompt_begins_with_bos_and_a_space_and_a_completion_with_neither(spm):
    assert pieces(spm, spm.encode_text("the cat"))[:2] == ["<s>", "\u2581the"]
    completion = pieces(spm, spm.encode_text("the cat", add_special_tokens=False))
    assert "".join(completion) == "the\u2581cat"
    assert "".join(pieces(spm, spm.encode_text(" 4", add_special_tokens=False))) == "\u25814"


def test_control_symbols_in_a_text_become_their_tokens(spm):
    ids = spm.encode_text("say 4</s>", add_special_tokens=False)
    assert ids[-1] == 2
    assert spm.decode(ids) == "say 4</s>"
    assert spm.decode(ids, skip_special_tokens=True) == "say 4"
    assert spm.stop_token_ids(["</s>"]) == (2,)


def test_text_survives_encoding_and_decoding(spm):
    for text in ("the cat sat", "say 4</s>say 7", "4 4", "<s>the mat"):
        assert spm.decode(spm.encode_text(text, add_special_tokens=False)) == text


def test_a_chat_is_rendered_with_the_models_own_special_tokens(spm):
    text = spm.render_chat([{"role": "user", "content": "say 4"}])
    assert text == "<s><user>say 4</s><assistant>"
    names = pieces(spm, spm.encode_text(text, add_special_tokens=False))
    assert (names[:2], names[-2:]) == (["<s>", "<user>"], ["</s>", "<assistant>"])
    assert "".join(names[2:-2]) == "say\u25814"


def test_earlier_assistant_turns_are_found_by_their_offsets(spm):
    turns = [("user", "say 4"), ("assistant", "4 4"), ("user", "the cat"), ("assistant", "sat")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = RowEncoder(spm, RowLimits(99)).encode({"messages": messages}, number=1)
    counted = [i for i, counts in zip(prompt.ids, prompt.loss_mask, strict=True) if counts]
    assert spm.decode(counted) == "4 4</s>"
    assert prompt.ids == spm.encode_text(prompt.text, add_special_tokens=False)
    assert spm.decode(prompt.completion_ids) == "sat</s>"


def test_offsets_cover_the_text_and_give_the_same_ids(spm):
    text = "<s><user>say 47 times</s><assistant>"
    ids, flags = spm.encode_spans(text, [(0, len(text))])
    assert ids == spm.encode_text(text, add_special_tokens=False)
    assert all(flags)


def test_the_model_file_itself_is_accepted_and_means_the_same(folder, spm):
    from_file = load_tokenizer(folder / "tokenizer.model")
    require_same_vocabulary(spm, from_file)
    assert from_file.encode_text("say 47 times") == spm.encode_text("say 47 times")


def test_the_kind_decides_where_both_are_there(folder, tmp_path):
    both = write_tokenizer(tmp_path / "both")
    (both / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert load_tokenizer(both).vocab_size == load_tokenizer(both, "hf").vocab_size == 27
    assert load_tokenizer(both, "sentencepiece").vocab_size == 80


def test_a_model_without_control_symbols_or_eos(tmp_path):
    bare = train(tmp_path / "bare", bos_id=-1, eos_id=-1, pad_id=-1)
    with pytest.raises(DataError, match="completions would never end"):
        load_tokenizer(bare)
    (bare / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    tokenizer = load_tokenizer(bare)
    ids = tokenizer.encode_text("the cat")
    assert (pieces(tokenizer, ids)[0], tokenizer.pad_id) == ("\u2581the", 5)


@pytest.mark.parametrize("content", [None, b"no model"])
def test_what_is_no_model_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        DataError, match=r"tokenizer\.model is not a usable SentencePiece model: .*tokenizer_kind: hf"
    ):
        load_tokenizer(tmp_path, "sentencepiece")
