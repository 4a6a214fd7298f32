"""Conversations, teacher prompts and truncation of single rows; bad rows in files are in test_prompts."""

import pytest

from megatron_gkd.data.rows import BadRow, OverlongRow, RowEncoder, RowLimits
from tests.unit.data.conftest import CHAT_TEMPLATE

BOS, EOS, EOT, USER, ASSISTANT, W0 = 2, 3, 4, 5, 6, 7


def chat(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def encode(tokenizer, row, **limits):
    return RowEncoder(tokenizer, RowLimits(**{"prompt": 20, **limits})).encode(row, number=1)


def counted(prompt) -> list[int]:
    return [i for i, counts in zip(prompt.ids, prompt.loss_mask, strict=True) if counts]


def test_the_last_assistant_turn_is_the_completion_and_earlier_ones_keep_their_end(make_tokenizer):
    tokenizer = make_tokenizer(generation_eos=[EOT])
    prompt = encode(tokenizer, {"messages": chat("w1", "w2 w3", "w4", "w5")})
    assert prompt.ids == (
        BOS,
        USER,
        W0 + 1,
        EOT,
        ASSISTANT,
        W0 + 2,
        W0 + 3,
        EOT,
        USER,
        W0 + 4,
        EOT,
        ASSISTANT,
    )
    assert [i for i, counts in enumerate(prompt.loss_mask) if counts] == [5, 6, 7]
    assert prompt.completion_ids == (W0 + 5, EOS)
    same = encode(tokenizer, {"prompt": chat("w1", "w2 w3", "w4"), "completion": "w5"})
    assert (same.ids, same.completion_ids, same.loss_mask) == (prompt.ids, prompt.completion_ids, ())


def test_an_end_of_turn_that_is_no_end_of_sequence_does_not_count(tokenizer):
    prompt = encode(tokenizer, {"messages": chat("w1", "w2", "w3", "w4")})
    assert counted(prompt) == [W0 + 2]


def test_content_that_occurs_elsewhere_is_found_in_its_own_turn(tokenizer):
    prompt = encode(tokenizer, {"messages": chat("w1 w1", "w1", "w1", "w2")})
    assert [i for i, counts in enumerate(prompt.loss_mask) if counts] == [6]


def test_a_conversation_of_one_turn_is_prompt_and_completion(tokenizer):
    prompt = encode(tokenizer, {"messages": chat("w1", "w2")})
    assert (prompt.ids[2], prompt.completion_ids, prompt.loss_mask) == (W0 + 1, (W0 + 2, EOS), ())


def test_a_conversation_that_ends_with_the_user_has_no_completion(tokenizer):
    prompt = encode(tokenizer, {"messages": chat("w1", "w2", "w3")})
    assert prompt.completion_ids is None
    assert counted(prompt) == [W0 + 2]


def test_a_template_that_strips_contents_is_followed(make_tokenizer):
    stripping = make_tokenizer(chat_template=CHAT_TEMPLATE.replace("m.content", "m.content.strip()"))
    prompt = encode(stripping, {"messages": chat("w1", " w2\n", "w3", "w4")})
    assert counted(prompt) == [W0 + 2]


def test_a_template_that_treats_the_last_turn_in_its_own_way_is_followed(make_tokenizer):
    special = CHAT_TEMPLATE.replace(">{{ m.content }}", ">{% if loop.last %}w9 {% endif %}{{ m.content }}")
    prompt = encode(make_tokenizer(chat_template=special), {"messages": chat("w1", "w2", "w3", "w4")})
    assert counted(prompt) == [W0 + 2]


def test_a_template_that_changes_earlier_turns_is_refused(make_tokenizer):
    shortening = CHAT_TEMPLATE.replace("m.content", "m.content.split(' ')[-1]")
    with pytest.raises(
        BadRow, match=r"chat template changes the text of earlier assistant turns.*last turn alone"
    ):
        encode(make_tokenizer(chat_template=shortening), {"messages": chat("w1", "w1 w2", "w3", "w4")})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "w1"}, "messages is a str, not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": chat("w1", "w2"), "completion": "w3"}, "there is a completion too"),
        ({"messages": chat("w1", "w2")[1:]}, "begin with the assistant's turn"),
        ({"prompt": "w1", "teacher_prompt": 3}, "teacher_prompt is a int"),
        ({"prompt": "w1", "teacher_prompt": " "}, "teacher_prompt is empty"),
        ({"question": "w1"}, r"no prompt and no messages among its keys \(question\); set data\.prompt_key"),
    ],
)
def test_unusable_rows_say_why(tokenizer, row, message):
    with pytest.raises(BadRow, match=message):
        encode(tokenizer, row)


def test_a_prompt_comes_before_a_conversation_and_the_ignored_key_is_told(tokenizer):
    row = {"prompt": "w1", "messages": chat("w2", "w3"), "source": "x"}
    assert encode(tokenizer, row).ids == (BOS, W0 + 1)
    encoder = RowEncoder(tokenizer, RowLimits(20))
    assert encoder.unused_keys(row) == {"messages", "source"}
    assert encoder.unused_keys({"messages": chat("w2", "w3"), "completion": None}) == set()


def test_the_teachers_prompt_is_encoded_as_a_prompt_and_omits_earlier_turns(tokenizer):
    row = {"messages": chat("w1", "w2", "w3", "w4"), "teacher_prompt": chat("w5")}
    prompt = encode(tokenizer, row)
    assert prompt.teacher_ids == (BOS, USER, W0 + 5, EOT, ASSISTANT)
    assert prompt.loss_mask == ()
    assert encode(tokenizer, {"prompt": "w1", "teacher_prompt": "w2 w3"}).teacher_ids == (BOS, W0 + 2, W0 + 3)
    assert encode(tokenizer, {"prompt": "w1", "teacher_prompt": None}).teacher_ids == ()


@pytest.mark.parametrize(
    ("truncation", "kept"), [("left", (W0 + 3, W0 + 4, W0 + 5)), ("right", (BOS, W0 + 1, W0 + 2))]
)
def test_truncation_cuts_one_side_of_prompts_and_never_completions(tokenizer, truncation, kept):
    row = {"prompt": "w1 w2 w3 w4 w5", "completion": "w6 w7 w8"}
    prompt = encode(tokenizer, row, prompt=3, truncation=truncation)
    assert (prompt.ids, len(prompt.completion_ids)) == (kept, 4)
    assert encode(tokenizer, row, prompt=6, truncation=truncation).ids == encode(tokenizer, row).ids
    with pytest.raises(OverlongRow, match="completion has 4 tokens"):
        encode(tokenizer, row, prompt=3, truncation=truncation, completion=3)


def test_truncation_cuts_the_flags_with_their_tokens_and_nothing_predicts_the_first(tokenizer):
    row = {"messages": chat("w1", "w2 w3", "w4", "w5")}
    whole = encode(tokenizer, row)
    cut = encode(tokenizer, row, prompt=len(whole.ids) - 5, truncation="left")
    assert cut.ids == whole.ids[5:]
    assert whole.loss_mask[5:7] == (True, True)
    assert cut.loss_mask == (False, *whole.loss_mask[6:])
    assert encode(tokenizer, row, prompt=4, truncation="right").loss_mask == ()


def test_the_teachers_prompt_has_its_own_limit(tokenizer):
    row = {"prompt": "w1", "teacher_prompt": "w1 w2 w3"}
    assert len(encode(tokenizer, row, prompt=2, teacher_prompt=4).teacher_ids) == 4
    with pytest.raises(
        OverlongRow, match=r"teacher_prompt has 4 tokens, more than data\.max_teacher_prompt_length=3"
    ):
        encode(tokenizer, row, prompt=2, teacher_prompt=3)
    with pytest.raises(OverlongRow, match="=2"):
        encode(tokenizer, row, prompt=2)
    assert encode(tokenizer, row, prompt=2, truncation="left").teacher_ids == (W0 + 2, W0 + 3)
