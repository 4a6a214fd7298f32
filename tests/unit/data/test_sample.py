"""Loss masks, padding and splits of batches; what the models do with them is covered in tests/distributed."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.data.sample import Batch, Sample

PAD = 99


def make_sample(prompt_length: int, completion_length: int, row: int = 0) -> Sample:
    """Prompt tokens are 1.., completion tokens 1000.., so that a token tells what it is."""
    return Sample(
        row=row,
        sample_index=0,
        prompt_ids=tuple(range(1, prompt_length + 1)),
        completion_ids=tuple(range(1000 + 100 * row, 1000 + 100 * row + completion_length)),
        is_on_policy=row % 2 == 0,
        finish_reason="stop" if row % 2 == 0 else "data",
        weight_version=row if row % 2 == 0 else -1,
    )


def split(batch: Batch, micro_batch_size: int, dp_size: int = 1, dp_rank: int = 0, seq_length: int = 8):
    return batch.micro_batches(
        micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, seq_length=seq_length, pad_id=PAD
    )


def test_position_i_is_in_the_loss_when_token_i_plus_1_is_a_completion_token():
    (micro_batch,) = split(Batch((make_sample(3, 2),)), 1)
    assert micro_batch.tokens_BS.tolist() == [[1, 2, 3, 1000, 1001, PAD, PAD, PAD]]
    assert micro_batch.loss_mask_BS.tolist() == [[False, False, True, True, False, False, False, False]]
    assert micro_batch.position_ids_BS.tolist() == [list(range(8))]
    assert (micro_batch.tokens_BS.dtype, micro_batch.position_ids_BS.dtype) == (torch.int64, torch.int64)
    assert micro_batch.loss_mask_BS.dtype == torch.bool


def test_earlier_turns_of_the_prompt_count_beside_the_completion():
    sample = replace(make_sample(4, 2), prompt_loss_mask=(False, True, False, False))
    assert sample.num_loss_tokens == Batch((sample,)).num_loss_tokens == 3
    (micro_batch,) = split(Batch((sample,)), 1)
    targets = micro_batch.tokens_BS.roll(-1, dims=1)[micro_batch.loss_mask_BS]
    assert targets.tolist() == [2, 1000, 1001]


def test_the_teacher_reads_its_own_prompt_before_the_same_loss_tokens():
    samples = (replace(make_sample(2, 3), teacher_prompt_ids=(7, 8, 9, 10)), make_sample(3, 2, row=1))
    batch = Batch(samples)
    seen = batch.as_read_by_teacher()
    assert [s.prompt_ids for s in seen.samples] == [(7, 8, 9, 10), (1, 2, 3)]
    assert seen.num_loss_tokens == batch.num_loss_tokens
    targets = [
        m.tokens_BS.roll(-1, dims=1)[m.loss_mask_BS].tolist() for b in (batch, seen) for m in split(b, 2)
    ]
    assert targets[0] == targets[1]


def test_a_mask_that_does_not_fit_is_refused():
    for mask in ((False,), (True, False)):
        with pytest.raises(ValueError, match="one flag for each of 2 tokens, the first of them False"):
            replace(make_sample(2, 2), prompt_loss_mask=mask)
    with pytest.raises(ValueError, match="teacher's own prompt has no logits"):
        replace(make_sample(2, 2), prompt_loss_mask=(False, True), teacher_prompt_ids=(1,))


def test_prompt_of_one_token_is_in_the_loss_from_position_zero():
    assert make_sample(1, 2).loss_mask(4) == [True, True, False, False]


def test_sequence_that_fills_the_length_keeps_its_last_target():
    (micro_batch,) = split(Batch((make_sample(2, 2),)), 1, seq_length=4)
    assert micro_batch.loss_mask_BS.tolist() == [[False, True, True, False]]


def test_empty_completion_has_no_loss():
    batch = Batch((make_sample(3, 0),))
    assert batch.num_loss_tokens == 0
    assert not split(batch, 1)[0].loss_mask_BS.any()


lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths, copies=st.integers(1, 3), micro_batch_size=st.integers(1, 5), extra=st.integers(0, 3))
def test_every_completion_token_is_predicted_exactly_once_for_any_split(
    lengths, copies, micro_batch_size, extra
):
    samples = tuple(make_sample(p, c, row) for row, (p, c) in enumerate(lengths * copies))
    batch = Batch(samples)
    seq_length = batch.padded_length(1) + extra
    expected = sorted(token for sample in samples for token in sample.completion_ids)
    for dp_size in [d for d in range(1, len(samples) + 1) if len(samples) % d == 0]:
        parts = [m for r in range(dp_size) for m in split(batch, micro_batch_size, dp_size, r, seq_length)]
        targets = [t for m in parts for t in m.tokens_BS.roll(-1, dims=1)[m.loss_mask_BS].tolist()]
        assert sorted(targets) == expected
        assert len(expected) == batch.num_loss_tokens
        assert [i for m in parts for i in m.indices] == list(range(len(samples)))
        assert {m.tokens_BS.shape for m in parts} == {(micro_batch_size, seq_length)}
        for m in parts:
            for row, index in enumerate(m.indices):
                sample = samples[index]
                ids = sample.prompt_ids + sample.completion_ids
                assert m.tokens_BS[row].tolist() == [*ids, *[PAD] * (seq_length - len(ids))]


def test_last_micro_batch_is_filled_up_with_blank_rows_without_loss():
    batch = Batch(tuple(make_sample(2, 2, row) for row in range(3)))
    first, last = split(batch, 2)
    assert (first.indices, last.indices) == ((0, 1), (2,))
    assert last.tokens_BS[1].tolist() == [PAD] * 8
    assert not last.loss_mask_BS[1].any()


def test_rank_owns_a_contiguous_run_of_samples():
    batch = Batch(tuple(make_sample(2, 2, row) for row in range(6)))
    assert [[m.indices for m in split(batch, 2, 3, r)] for r in range(3)] == [[(0, 1)], [(2, 3)], [(4, 5)]]
    assert [m.indices for m in split(batch, 1, 2, 1)] == [(3,), (4,), (5,)]


@pytest.mark.parametrize(("dp_size", "dp_rank"), [(2, 0), (3, 3), (3, -1)])
def test_split_that_does_not_fit_is_refused(dp_size, dp_rank):
    batch = Batch(tuple(make_sample(2, 2, row) for row in range(3)))
    with pytest.raises(ValueError, match=r"make train\.global_batch_size a multiple"):
        split(batch, 1, dp_size, dp_rank)


def test_too_long_sequence_is_refused_and_never_cut():
    with pytest.raises(
        ValueError, match=r"row 7 has 5 prompt and 4 completion tokens, more than seq_length 8; lower"
    ):
        split(Batch((make_sample(5, 4, row=7),)), 1)


@pytest.mark.parametrize(("multiple_of", "expected"), [(1, 7), (4, 8), (7, 7), (16, 16)])
def test_padded_length_is_the_next_multiple(multiple_of, expected):
    assert Batch((make_sample(3, 4), make_sample(5, 1))).padded_length(multiple_of) == expected


def test_batch_survives_json():
    samples = [make_sample(2 + row, 3, row) for row in range(3)]
    samples[0] = replace(samples[0], file=2, prompt_loss_mask=(False, True))
    samples[1] = replace(samples[1], teacher_prompt_ids=(5, 6))
    batch = Batch(tuple(samples))
    assert Batch.from_json(json.loads(json.dumps(batch.to_json()))) == batch


@pytest.mark.parametrize("value", [{}, {"samples": [{"row": 1}]}, {"samples": 3}, {"samples": [5]}])
def test_json_that_is_no_batch_is_refused(value):
    with pytest.raises(ValueError, match=r"not a batch written by Batch\.to_json"):
        Batch.from_json(value)


def test_json_with_an_unknown_field_is_refused():
    value = Batch((make_sample(2, 2),)).to_json()
    value["samples"][0]["reward"] = 1.0
    with pytest.raises(ValueError, match="reward"):
        Batch.from_json(value)


def test_sample_without_prompt_or_with_unknown_reason_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        make_sample(0, 2)
    with pytest.raises(ValueError, match="finish_reason 'abort'"):
        replace(make_sample(1, 1), finish_reason="abort")
