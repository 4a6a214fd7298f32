"""The tokenizer wrapper on a word tokenizer; real models' tokenizers are covered by the quickstart (tests/e2e)."""

import pytest

from megatron_gkd.data.tokenizer import (
    DataError,
    MessagesRefused,
    load_tokenizer,
    require_same_vocabulary,
    tokenizer_fingerprint,
)

UNK, PAD, BOS, EOS, EOT, USER, ASSISTANT, W0 = range(8)


def test_prompt_text_gets_the_default_special_tokens_and_a_completion_none(tokenizer):
    assert tokenizer.encode_text("w0 w1") == (BOS, W0, W0 + 1)
    assert tokenizer.encode_text("w0 w1", add_special_tokens=False) == (W0, W0 + 1)


def test_rendered_chat_ends_where_the_assistant_begins_and_has_one_bos(tokenizer):
    text = tokenizer.render_chat([{"role": "user", "content": "w3"}])
    assert tokenizer.encode_text(text, add_special_tokens=False) == (BOS, USER, W0 + 3, EOT, ASSISTANT)


def test_missing_chat_template_names_folder_and_fix(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(chat_template=None)
    assert not tokenizer.has_chat_template
    with pytest.raises(DataError, match=r"model has no chat template.*add chat_template\.jinja"):
        tokenizer.render_chat([{"role": "user", "content": "w3"}])


def test_messages_that_the_template_refuses_are_told_with_its_reason(tokenizer):
    with pytest.raises(MessagesRefused, match="roles must alternate"):
        tokenizer.render_chat([{"role": "user", "content": "w1"}] * 2)


@pytest.mark.parametrize(
    ("generation_eos", "expected"),
    [
        (None, (EOS,)),
        (EOS, (EOS,)),
        (EOT, (EOS, EOT)),
        ([EOT, EOS], (EOS, EOT)),
        ([EOT, BOS], (EOS, EOT, BOS)),
    ],
)
def test_eos_ids_are_the_tokenizers_own_first_then_those_of_generation_config(
    make_tokenizer, generation_eos, expected
):
    assert make_tokenizer(generation_eos=generation_eos).eos_ids == expected


def test_eos_of_generation_config_suffices(make_tokenizer):
    assert make_tokenizer(eos=None, generation_eos=[EOT]).eos_ids == (EOT,)


@pytest.mark.parametrize("generation_eos", [[999], "x", [True], {"a": 1}])
def test_unusable_eos_in_generation_config_is_refused(make_tokenizer, generation_eos):
    with pytest.raises(DataError, match=r"eos_token_id in .*generation_config\.json"):
        make_tokenizer(generation_eos=generation_eos)


def test_tokenizer_without_any_eos_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="completions would never end"):
        make_tokenizer(eos=None)


def test_tokenizer_that_appends_eos_to_prompts_is_refused_at_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer(appends_eos=True)
    with pytest.raises(DataError, match="set add_eos_token to false"):
        tokenizer.encode_text("w0")
    assert tokenizer.encode_text("w0", add_special_tokens=False) == (W0,)


def test_padding_falls_back_to_eos(make_tokenizer, tokenizer):
    assert tokenizer.pad_id == PAD
    assert make_tokenizer("no_pad", pad=None).pad_id == EOS


def test_vocab_size_is_the_largest_id_plus_one(tokenizer):
    assert tokenizer.vocab_size == 27


def test_decode_shows_special_tokens_unless_told_otherwise(tokenizer):
    assert tokenizer.decode([W0, EOS]) == "w0 <eos>"
    assert tokenizer.decode([W0, EOS], skip_special_tokens=True) == "w0"


def test_stop_strings_become_ids_only_if_they_are_one_token(tokenizer):
    assert tokenizer.stop_token_ids(["<eot>", "w4"]) == (EOT, W0 + 4)
    with pytest.raises(DataError, match=r"rollout\.stop: 'w1 w2' is not one token"):
        tokenizer.stop_token_ids(["w1 w2"])
    with pytest.raises(DataError, match="is not one token"):  # one id, but that of any unknown word
        tokenizer.stop_token_ids(["never"])


def test_same_size_with_exchanged_ids_has_another_fingerprint_and_is_refused(make_tokenizer):
    words = [f"w{i}" for i in range(20)]
    student, same = (
        make_tokenizer("student", words=words),
        make_tokenizer("same", words=words, chat_template=None),
    )
    words[3], words[4] = words[4], words[3]
    teacher = make_tokenizer("teacher", words=words)
    assert student.vocab_size == teacher.vocab_size
    assert tokenizer_fingerprint(student) == tokenizer_fingerprint(same) != tokenizer_fingerprint(teacher)
    require_same_vocabulary(student, same)
    with pytest.raises(DataError, match=r"id 10: 'w3' and 'w4'; id 11: 'w4' and 'w3'"):
        require_same_vocabulary(student, teacher)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no usable tokenizer in .*; copy the model's tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_template_is_used_in_place_of_the_tokenizers_own(make_tokenizer):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}w9"
    tokenizer = load_tokenizer(make_tokenizer().folder, chat_template=template)
    assert tokenizer.render_chat([{"role": "user", "content": "w3"}]) == "w3 w9"


def test_a_template_that_is_no_jinja_is_named_with_its_line(make_tokenizer):
    template = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    tokenizer = load_tokenizer(make_tokenizer().folder, chat_template=template)
    with pytest.raises(
        DataError, match=r"line 2 of the chat template of .* is not valid Jinja.*data\.chat_template"
    ):
        tokenizer.render_chat([{"role": "user", "content": "w3"}])


def test_tokens_of_spans_are_flagged_with_the_end_of_sequence_behind_them(make_tokenizer):
    tokenizer = make_tokenizer(generation_eos=[EOT])
    ids, flags = tokenizer.encode_spans("w1 w2 w3 <eot> w4 <eot>", [(3, 9)])
    assert ids == tokenizer.encode_text("w1 w2 w3 <eot> w4 <eot>", add_special_tokens=False)
    assert flags == (False, True, True, True, False, False)
