"""Cutting at stop strings, against a search token by token, with tokens that split characters."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.rollout.base import cut_at_stop
from megatron_gkd.serving.protocol import Completion

# tokens 0.. are byte strings; "e with acute" and the euro sign are spread over several tokens
PIECES = (b"a", b"b", b"ab", b"ba", b"\n", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"Stop", b"op:")


def decode(ids):
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")


def cut(ids, stop):
    return cut_at_stop(Completion(tuple(ids), "length", 1), stop, decode)


def test_a_stop_string_over_several_tokens_ends_the_completion_with_its_last_token():
    assert cut([0, 9, 4, 1, 9], ["p\n"]) == Completion((0, 9, 4), "stop", 1)


def test_the_text_of_the_last_token_may_go_beyond_the_stop_string():
    assert cut([0, 9, 0], ["St"]) == Completion((0, 9), "stop", 1)


def test_a_completion_without_a_stop_string_is_unchanged():
    assert cut([0, 1], ["bb"]) == Completion((0, 1), "length", 1)
    assert cut([0, 1], []) == Completion((0, 1), "length", 1)


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=30),
    st.lists(
        st.sampled_from(["a", "ab", "bab", "Stop", "pop", "\n", "\u00e9", "\u20aca"]), min_size=1, max_size=3
    ),
)
def test_the_cut_is_at_the_first_token_whose_text_contains_a_stop_string(ids, stop):
    found = [n for n in range(1, len(ids) + 1) if any(text in decode(ids[:n]) for text in stop)]
    expected = Completion(tuple(ids[: found[0]]), "stop", 1) if found else Completion(tuple(ids), "length", 1)
    assert cut(ids, stop) == expected
