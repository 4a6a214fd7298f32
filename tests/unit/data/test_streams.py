"""Streams that read while training, and mixtures by weight: order, memory, and going on after a restart.

The stream over prompts in memory is tested in test_prompts.
"""

import json
import logging
import weakref
from collections import Counter

import pytest

from megatron_gkd.data.prompts import PromptSet, RowPolicy
from megatron_gkd.data.row_files import open_row_files
from megatron_gkd.data.rows import RowEncoder, RowLimits
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.streams import MixedPrompts, PromptLoader, PromptsChanged, StreamedPrompts
from megatron_gkd.data.tokenizer import DataError

SIZES = (13, 8)


@pytest.fixture
def files(tmp_path):
    """Two files; a prompt is the number of its row, as a word."""
    for index, size in enumerate(SIZES):
        text = "".join(json.dumps({"prompt": f"w{row}"}) + "\n" for row in range(size))
        (tmp_path / f"{index}.jsonl").write_text(text)
    return open_row_files([tmp_path / f"{index}.jsonl" for index in range(len(SIZES))])


@pytest.fixture
def stream(files, tokenizer):
    """stream(files=..., seed=..., shuffle=..., block_rows=..., **policy)"""

    def make(files=files, *, seed=1, shuffle=True, block_rows=4, **policy):
        encoder = RowEncoder(tokenizer, RowLimits(8))
        return StreamedPrompts(
            files, encoder, RowPolicy(**policy), seed=seed, shuffle=shuffle, block_rows=block_rows
        )

    return make


def places(stream, n: int) -> list[tuple[int, int]]:
    return [(prompt.file, prompt.row) for prompt in stream.take(n)]


ALL = [(file, row) for file, size in enumerate(SIZES) for row in range(size)]


@pytest.mark.parametrize("block_rows", [1, 4, 8, 13, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pass_gives_every_row_once(stream, block_rows, shuffle):
    taken = places(stream(block_rows=block_rows, shuffle=shuffle), 3 * len(ALL))
    passes = [taken[i : i + len(ALL)] for i in range(0, len(taken), len(ALL))]
    assert all(sorted(part) == ALL for part in passes)
    if not shuffle:
        assert passes == [ALL] * 3
    elif block_rows > 1:
        assert passes[0] != passes[1] != ALL


def test_rows_are_shuffled_within_their_block_only(stream):
    taken = places(stream(block_rows=5), 13)
    assert taken[:5] != ALL[:5]
    assert [sorted(taken[i : i + 5]) for i in (0, 5, 10)] == [ALL[0:5], ALL[5:10], ALL[10:13]]


@pytest.mark.parametrize("num_before", [0, 1, 4, 12, 13, 20, 21, 22, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_resumed_stream_continues_exactly(stream, num_before, shuffle):
    first = stream(shuffle=shuffle)
    first.take(num_before)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = stream(shuffle=shuffle)
    resumed.load_state_dict(state)
    assert places(resumed, 60) == places(first, 60)
    assert resumed.state_dict() == first.state_dict()


def test_the_order_depends_on_the_seed(stream):
    assert len({tuple(places(stream(seed=seed), 21)) for seed in range(4)}) == 4


class Row(dict):
    """A mapping that can be watched: each is itself alone."""

    __hash__ = object.__hash__


def test_no_more_than_a_block_of_rows_is_held(stream, tmp_path):
    alive, most = weakref.WeakSet(), 0

    def rows(path):
        nonlocal most
        for number in range(2000):
            row = Row(prompt=f"w{number % 20}")
            alive.add(row)
            most = max(most, len(alive))
            yield row
            del row

    (tmp_path / "endless").write_text("")
    files = open_row_files([tmp_path / "endless"], make=rows)
    prompts = stream(files, block_rows=50)
    for _ in range(40):
        prompts.take(50)
    assert 50 <= most <= 52, most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, r"seed 1 \(now 2\); set train\.seed back"),
        ({"shuffle": False}, r"set data\.shuffle back"),
        ({"block_rows": 5}, r"shuffle_rows 4 \(now 5\); set data\.shuffle_rows back"),
    ],
)
def test_the_state_of_another_stream_is_refused(stream, changes, message):
    with pytest.raises(DataError, match=message):
        stream(**changes).load_state_dict(stream().state_dict())


def test_the_state_of_other_files_or_of_another_kind_of_stream_is_refused(stream, files):
    state = stream().state_dict()
    with pytest.raises(DataError, match=r"set data\.prompts back"):
        stream(files[:1]).load_state_dict(state)
    in_memory = PromptLoader(prompt_set(3), seed=1, shuffle=True)
    with pytest.raises(
        DataError, match=r"another kind, without shuffle_rows; set data\.streaming, data\.weights back"
    ):
        stream().load_state_dict({**in_memory.state_dict(), "fingerprint": state["fingerprint"]})


def test_a_bad_first_row_is_refused_at_once(stream, files):
    files[0].path.write_text('{"question": "w1"}\n')
    with pytest.raises(DataError, match=r"0\.jsonl:1: no prompt and no messages"):
        stream()


def test_bad_rows_are_counted_in_a_pass_and_after_a_restart(stream, files):
    lines = files[0].path.read_text().splitlines(keepends=True)
    files[0].path.write_text("".join([*lines[:3], "x\n", *lines[3:], "y\n"]))
    prompts = stream(shuffle=False, max_bad_rows=2)
    assert len(places(prompts, 60)) == 60, "two bad rows in each pass are allowed"
    first = stream(shuffle=False, max_bad_rows=1)
    first.take(6)
    resumed = stream(shuffle=False, max_bad_rows=1)
    resumed.load_state_dict(first.state_dict())
    for one in (first, resumed):
        with pytest.raises(
            DataError, match=r"more than data\.max_bad_rows=1 bad rows(.|\n)*:4: (.|\n)*:15: "
        ):
            one.take(20)


def test_overlong_rows_are_left_out_or_refused(stream, files):
    files[0].path.write_text(json.dumps({"prompt": "w1 " * 9}) + "\n")
    assert {file for file, _ in places(stream(), 20)} == {1}
    with pytest.raises(DataError, match=r"0\.jsonl:1: prompt has 10 tokens.*set data\.truncation"):
        stream(overlong="error")
    with pytest.raises(DataError, match=r"0\.jsonl has no usable prompt"):
        stream(files[:1])


def test_dropped_rows_are_counted_in_each_pass_and_over_a_restart(stream, files, caplog):
    rows = [{"prompt": "w1 " * 9} if row in (1, 9) else {"prompt": "w1"} for row in range(13)]
    files[0].path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "x\n")
    prompts = stream(shuffle=False, max_bad_rows=1)
    prompts.take(5)  # past the first of them
    state = json.loads(json.dumps(prompts.state_dict()))
    resumed = stream(shuffle=False, max_bad_rows=1)
    resumed.load_state_dict(state)
    with caplog.at_level(logging.INFO):
        resumed.take(15)  # 11 + 8 prompts in a pass
    (summary,) = [message for message in caplog.messages if "epoch 1" in message]
    assert summary.endswith("1.jsonl, epoch 1: 19 prompts, 1 bad rows skipped, 2 overlong rows dropped")
    assert resumed.state_dict()["overlong"] == 0


def test_a_state_from_before_overlong_rows_were_counted_is_continued(stream):
    first = stream()
    first.take(5)
    state = {key: value for key, value in first.state_dict().items() if key != "overlong"}
    resumed = stream()
    resumed.load_state_dict(state)
    assert places(resumed, 30) == places(first, 30)


def test_a_missing_completion_is_refused_where_it_is_needed(stream):
    with pytest.raises(DataError, match=r"0\.jsonl:\d+ has no completion, needed by gkd\.lmbda below 1"):
        stream(completions_needed_by="gkd.lmbda below 1")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_files_are_refused(stream, files, text):
    for file in files:
        file.path.write_text(text)
    with pytest.raises(DataError, match="no usable prompt"):
        stream()


def test_nobody_knows_how_long_a_stream_is(stream):
    assert stream().prompts_per_epoch is None
    assert PromptLoader(prompt_set(3), seed=1, shuffle=True).prompts_per_epoch == 3
    assert [p.row for p in stream(shuffle=False).first_prompts(2)] == [0]


def prompt_set(size: int, file: int = 0) -> PromptSet:
    prompts = tuple(Prompt(row, (row,), None, str(row), file=file) for row in range(size))
    return PromptSet(prompts, f"{file}.jsonl", f"fingerprint {file}")


def mixed(*weights: float, sizes=(7, 5, 11)) -> MixedPrompts:
    loaders = [
        PromptLoader(prompt_set(size, file), seed=1, shuffle=True)
        for file, size in enumerate(sizes[: len(weights)])
    ]
    return MixedPrompts(loaders, weights)


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (0.7, 0.2, 0.1), (5, 1, 100)])
def test_shares_are_exact_to_less_than_two_prompts_at_any_time(weights):
    stream, counts = mixed(*weights), Counter()
    for num in range(1, 400):
        counts.update(file for file, _ in places(stream, 1))
        for file, weight in enumerate(weights):
            assert abs(counts[file] - weight / sum(weights) * num) < 2


def test_each_file_of_a_mixture_goes_through_its_own_passes():
    taken = places(mixed(1, 1), 140)
    for file, size in ((0, 7), (1, 5)):
        rows = [row for of, row in taken if of == file]
        assert all(sorted(rows[i : i + size]) == list(range(size)) for i in range(0, 70, size))


@pytest.mark.parametrize("num_before", [0, 1, 10, 77])
def test_a_resumed_mixture_continues_exactly(num_before, stream, files):
    def make():
        return MixedPrompts([stream(files[:1]), stream(files[1:])], (2.5, 1))

    for build in (make, lambda: mixed(3, 1, 2)):
        first, resumed = build(), build()
        first.take(num_before)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert places(resumed, 50) == places(first, 50)


def test_the_state_of_another_mixture_is_refused():
    with pytest.raises(DataError, match=r"weights \[3, 1\] \(now \[1, 3\]\); set data\.weights back"):
        mixed(1, 3).load_state_dict(mixed(3, 1).state_dict())
    with pytest.raises(
        DataError, match=r"another kind, without weights; set data\.streaming, data\.weights back"
    ):
        mixed(1, 3).load_state_dict(PromptLoader(prompt_set(3), seed=1, shuffle=True).state_dict())


def test_a_refused_state_changes_nothing():
    state = mixed(1, 1).state_dict()
    state["streams"][1]["seed"] = 7
    stream = mixed(1, 1)
    stream.take(5)
    expected = stream.state_dict()
    with pytest.raises(PromptsChanged) as caught:
        stream.load_state_dict(state)
    assert caught.value.keys == ("train.seed",)
    assert stream.state_dict() == expected


def test_a_mixture_starts_with_its_first_file():
    assert [(p.file, p.row) for p in mixed(1, 1).first_prompts(2)] == [(0, 0), (0, 1)]
    assert mixed(1, 1).prompts_per_epoch is None
