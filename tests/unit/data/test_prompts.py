"""Prompt files with every kind of bad row, and the stream over the rest; the shuffle is checked for its contract only."""

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_gkd.data import row_files
from megatron_gkd.data.prompts import PromptSet, RowPolicy, load_prompts
from megatron_gkd.data.row_files import open_row_files
from megatron_gkd.data.rows import RowEncoder, RowLimits
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.streams import PromptLoader
from megatron_gkd.data.tokenizer import DataError

BOS, EOS, EOT, W0 = 2, 3, 4, 7
NEEDED_BY = "gkd.lmbda below 1; add it"


def load(path: Path, tokenizer, max_completion_length: int | None = None, **policy) -> PromptSet:
    """The prompts of a file, of at most eight tokens."""
    encoder = RowEncoder(
        tokenizer, RowLimits(policy.pop("max_prompt_length", 8), None, max_completion_length)
    )
    return load_prompts(open_row_files([path]), encoder, RowPolicy(**policy))


def write(folder: Path, *lines) -> Path:
    """A prompt file; objects become JSON, bytes stay."""
    path = folder / "prompts.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def test_text_and_chat_prompts_are_encoded_and_completions_end_with_eos(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(generation_eos=[EOT])
    path = write(
        tmp_path,
        {"prompt": "w0 w1", "completion": "w2"},
        b"  ",
        {"prompt": [{"role": "user", "content": "w3"}], "completion": "w4 <eot>", "source": "x"},
        {"prompt": "w5", "completion": None},
    )
    prompts = load(path, tokenizer)
    assert [(p.row, p.ids, p.completion_ids) for p in prompts.prompts] == [
        (0, (BOS, W0, W0 + 1), (W0 + 2, EOS)),
        (2, (BOS, 5, W0 + 3, EOT, 6), (W0 + 4, EOT)),
        (3, (BOS, W0 + 5), None),
    ]
    assert prompts.prompts[1].text == "<bos><user>w3<eot><assistant>"
    assert prompts.num_bad == prompts.num_overlong == 0
    assert prompts.summary().endswith(
        "3 prompts (2 with completion), 0 bad rows skipped, 0 overlong rows dropped, ignored keys: source"
    )


BAD_ROWS = {
    "not UTF-8": b'{"prompt": "w\xff"}',
    "not JSON": b'{"prompt": "w0',
    "a JSON list, not an object": b"[1]",
    "no prompt and no messages among its keys": {"completion": "w1"},
    "prompt is empty": {"prompt": " "},
    "prompt is a int, not text or messages": {"prompt": 3},
    "prompt is empty$": {"prompt": []},
    "completion is a list, not text": {"prompt": "w0", "completion": ["w1"]},
    "completion is empty": {"prompt": "w0", "completion": ""},
    "continues after an end-of-sequence": {"prompt": "w0", "completion": "w1 <eos> w2"},
    "message 0 is not an object with exactly": {"prompt": ["w0"]},
    "message 1 is not an object with exactly": {
        "prompt": [{"role": "user", "content": "w0"}, {"role": "user"}]
    },
    "role 'usr', not one of": {"prompt": [{"role": "usr", "content": "w0"}]},
    "content of message 0 is a int": {"prompt": [{"role": "user", "content": 1}]},
    "roles must alternate": {"prompt": [{"role": "user", "content": "w0"}] * 2},
    "last message is the assistant's": {"prompt": [{"role": "assistant", "content": "w0"}]},
    "contains an unpaired surrogate": b'{"prompt": "w0 \\ud800"}',
    "nested too deeply": b"[" * 100_000,
    "Exceeds the limit": b'{"prompt": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_row_is_refused_with_file_and_line(tmp_path, tokenizer, reason):
    path = write(tmp_path, {"prompt": "w0"}, b"", BAD_ROWS[reason], {"prompt": "w1"})
    with pytest.raises(DataError, match=rf"prompts\.jsonl:3: .*{reason}"):
        load(path, tokenizer)


def test_every_row_is_accounted_for_when_bad_rows_are_allowed(tmp_path, tokenizer, caplog):
    good = [{"prompt": f"w{i}"} for i in range(5)]
    overlong = [{"prompt": "w0 " * 9}] * 3
    path = write(tmp_path, *BAD_ROWS.values(), *good, *overlong)
    with caplog.at_level("INFO", logger="megatron_gkd"):
        prompts = load(path, tokenizer, max_bad_rows=len(BAD_ROWS))
    assert [p.row for p in prompts.prompts] == [len(BAD_ROWS) + i for i in range(5)]
    assert (prompts.num_bad, prompts.num_overlong) == (len(BAD_ROWS), 3)
    for number in range(1, len(BAD_ROWS) + 1):
        assert f"prompts.jsonl:{number}: " in caplog.text
    assert f"{len(BAD_ROWS)} bad rows skipped, 3 overlong rows dropped" in prompts.summary()


@pytest.mark.parametrize(("num_bad", "is_refused"), [(2, False), (3, True)])
def test_limit_of_bad_rows_is_the_number_that_still_passes(tmp_path, tokenizer, num_bad, is_refused):
    path = write(tmp_path, {"prompt": "w0"}, *[b"x"] * num_bad)
    options = {"max_bad_rows": 2}
    if is_refused:
        with pytest.raises(DataError, match=r"more than data\.max_bad_rows=2 bad rows"):
            load(path, tokenizer, **options)
    else:
        assert load(path, tokenizer, **options).num_bad == num_bad


def test_refusal_names_the_first_ten_bad_rows(tmp_path, tokenizer):
    with pytest.raises(DataError) as error:
        load(write(tmp_path, *[b"x"] * 30), tokenizer)
    assert [f"prompts.jsonl:{n}:" in str(error.value) for n in range(1, 13)] == [True] * 10 + [False] * 2


def test_line_of_ten_megabytes_is_one_bad_row_and_the_next_line_is_read(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "w0 " * 3_400_000}, {"prompt": "w1"})
    assert path.stat().st_size > 10_000_000 > row_files.MAX_LINE_BYTES
    prompts = load(path, tokenizer, max_bad_rows=1)
    assert prompts.bad_rows == (f"{path}:1: longer than {row_files.MAX_LINE_BYTES} bytes",)
    assert [p.row for p in prompts.prompts] == [1]


@pytest.mark.parametrize("overshoot", [-1, 0, 1, 2, 3])
def test_line_limit_is_exact_around_its_own_length(tmp_path, tokenizer, monkeypatch, overshoot):
    line = b'{"prompt": "w0"}'
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", len(line) + 1 - overshoot)  # with its newline
    path = write(tmp_path, line, line)
    if overshoot > 0:
        with pytest.raises(DataError, match="2 bad"):
            load(path, tokenizer, max_bad_rows=2)
    else:
        prompts = load(path, tokenizer)
        assert [p.row for p in prompts.prompts] == [0, 1]


def test_last_line_without_newline_is_read(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w0"}\n{"prompt": "w1"}')
    assert len(load(path, tokenizer).prompts) == 2


def test_prompt_of_exactly_the_limit_is_kept_and_one_more_token_is_overlong(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "w0 " * 7}, {"prompt": "w0 " * 8})  # and one token in front
    prompts = load(path, tokenizer)
    assert [len(p.ids) for p in prompts.prompts] == [8]
    assert prompts.overlong_rows == (f"{path}:2: prompt has 9 tokens, more than data.max_prompt_length=8",)
    with pytest.raises(
        DataError,
        match=r"set data\.truncation, or set data\.overlong_prompts: drop\. First rows:\n.*:2: prompt has 9 tokens",
    ):
        load(path, tokenizer, overlong="error")


def test_completion_limit_counts_the_eos_token(tmp_path, tokenizer):
    path = write(
        tmp_path, {"prompt": "w0", "completion": "w1 w2"}, {"prompt": "w0", "completion": "w1 w2 w3"}
    )
    prompts = load(path, tokenizer, max_completion_length=3)
    assert [p.row for p in prompts.prompts] == [0]
    assert prompts.overlong_rows == (
        f"{path}:2: completion has 4 tokens, more than rollout.max_new_tokens=3",
    )


def test_missing_completions_are_named_only_where_they_are_required(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": "w0", "completion": "w1"}, {"prompt": "w0"}, {"prompt": "w1"})
    assert len(load(path, tokenizer).prompts) == 3
    with pytest.raises(
        DataError, match=r"2 rows without completion, needed by gkd\.lmbda below 1; add it(.|\n)*:2\n.*:3$"
    ):
        load(path, tokenizer, completions_needed_by=NEEDED_BY)


@pytest.mark.parametrize("lines", [[], [b"", b"  "], [{"prompt": "w0 " * 9}]])
def test_file_without_usable_prompt_is_refused(tmp_path, tokenizer, lines):
    with pytest.raises(DataError, match="no usable prompt"):
        load(write(tmp_path, *lines), tokenizer)


def test_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"data\.prompts: .*none\.jsonl does not exist"):
        load(tmp_path / "none.jsonl", tokenizer)


def test_missing_chat_template_ends_the_load_and_is_no_bad_row(tmp_path, make_tokenizer):
    path = write(tmp_path, {"prompt": [{"role": "user", "content": "w0"}]})
    with pytest.raises(DataError, match="has no chat template"):
        load(path, make_tokenizer(chat_template=None), max_bad_rows=5)


def test_fingerprint_changes_with_kept_rows_and_vocabulary_and_nothing_else(
    tmp_path, make_tokenizer, tokenizer
):
    lines = [{"prompt": "w0"}, {"prompt": "w1 w2"}]

    def fingerprint(*lines, tokenizer=tokenizer, **options):
        return load(write(tmp_path, *lines), tokenizer, **options).fingerprint

    first = fingerprint(*lines)
    assert fingerprint(*lines, max_bad_rows=3) == first
    assert fingerprint(lines[0], {"prompt": "w1 w3"}) != first
    assert fingerprint(lines[1], lines[0]) != first
    assert fingerprint(*lines, max_prompt_length=2) != first
    assert fingerprint(*lines, tokenizer=make_tokenizer("other", words=["w1", "w0", "w2"])) != first


def prompt_set(num_prompts: int, fingerprint: str = "f0") -> PromptSet:
    prompts = tuple(Prompt(row=i, ids=(i,), completion_ids=None, text=str(i)) for i in range(num_prompts))
    return PromptSet(prompts, "p.jsonl", fingerprint)


def rows_of(loader: PromptLoader, n: int) -> list[int]:
    return [prompt.row for prompt in loader.take(n)]


def test_each_epoch_gives_every_prompt_once_in_its_own_order():
    loader = PromptLoader(prompt_set(50), seed=1, shuffle=True)
    first, second = rows_of(loader, 50), rows_of(loader, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n", [1, 7, 23, 100])
def test_stream_does_not_depend_on_how_many_are_taken_at_once(n, shuffle):
    whole = rows_of(PromptLoader(prompt_set(10), seed=3, shuffle=shuffle), 300)
    loader = PromptLoader(prompt_set(10), seed=3, shuffle=shuffle)
    parts = [row for _ in range(300 // n) for row in rows_of(loader, n)]
    assert parts == whole[: len(parts)]


def test_without_shuffle_the_file_order_repeats():
    assert rows_of(PromptLoader(prompt_set(3), seed=3, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_order_depends_on_the_seed_and_not_on_global_random_state():
    orders = {tuple(rows_of(PromptLoader(prompt_set(20), seed=seed, shuffle=True), 20)) for seed in range(5)}
    assert len(orders) == 5


def test_order_is_the_recorded_one():
    # recorded once: a change of it breaks the resume of every existing run
    recorded = [5, 1, 0, 6, 2, 3, 4, 7, 2, 0, 4, 1, 7, 3, 6, 5]
    assert rows_of(PromptLoader(prompt_set(8), seed=1234, shuffle=True), 16) == recorded


def test_first_places_are_shared_evenly_between_prompts():
    firsts = Counter(
        rows_of(PromptLoader(prompt_set(4), seed=seed, shuffle=True), 1)[0] for seed in range(400)
    )
    assert all(60 < firsts[row] < 140 for row in range(4))  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize("num_before", [0, 1, 9, 10, 11, 37])
def test_resumed_stream_continues_exactly(num_before):
    loader = PromptLoader(prompt_set(10), seed=5, shuffle=True)
    loader.take(num_before)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = PromptLoader(prompt_set(10), seed=5, shuffle=True)
    resumed.load_state_dict(state)
    assert rows_of(resumed, 100) == rows_of(loader, 100)
    assert resumed.state_dict() == loader.state_dict()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            PromptLoader(prompt_set(3, "f1"), seed=5, shuffle=True),
            "fingerprint 'f0' .*'f1'.* set data.prompts back",
        ),
        (PromptLoader(prompt_set(3), seed=6, shuffle=True), "seed 5 .*now 6.*set train.seed back"),
        (
            PromptLoader(prompt_set(3), seed=5, shuffle=False),
            "shuffle True .*now False.*set data.shuffle back",
        ),
    ],
)
def test_state_of_another_stream_is_refused_and_both_are_named(loader, message):
    state = PromptLoader(prompt_set(3), seed=5, shuffle=True).state_dict()
    with pytest.raises(DataError, match=message):
        loader.load_state_dict(state)
