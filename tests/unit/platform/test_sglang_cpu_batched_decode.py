"""One decode step of a ragged batch, against attention of each sequence by itself."""

import pytest
import torch

from megatron_gkd.platform.batched_decode import decode_attention

SLOTS, GROUPS, HEADS, HEAD_SIZE = 64, 2, 6, 8


def _refuse(*args, **kwargs):
    raise AssertionError("the per-sequence function was called")


def _one_by_one(query_BHD, k_SGD, v_SGD, *, req_to_token, rows, lengths, scale, window):
    answers = []
    for query_HD, row, length in zip(query_BHD, rows.tolist(), lengths.tolist(), strict=True):
        first = 0 if window is None or window < 0 else max(0, length - 1 - window)
        slots = req_to_token[row, first:length].long()
        k_LHD = k_SGD[slots].repeat_interleave(HEADS // GROUPS, dim=1)
        v_LHD = v_SGD[slots].repeat_interleave(HEADS // GROUPS, dim=1)
        score_HL = torch.einsum("hd,lhd->hl", query_HD, k_LHD) * scale
        answers.append(torch.einsum("hl,lhd->hd", score_HL.softmax(-1), v_LHD))
    return torch.stack(answers)


@pytest.mark.parametrize("window", [None, -1, 0, 3, 100])
def test_equals_attention_of_each_sequence_even_beside_slots_with_nan(window):
    torch.manual_seed(0)
    lengths, rows = torch.tensor([1, 9, 4]), torch.tensor([2, 0, 3])
    query = torch.randn(3, HEADS, HEAD_SIZE)
    k_cache, v_cache = torch.randn(2, SLOTS, GROUPS, HEAD_SIZE)
    req_to_token = torch.randperm(SLOTS)[:48].reshape(4, 12).to(torch.int32)
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        unused = req_to_token[row, length:].long()
        k_cache[unused] = v_cache[unused] = torch.nan
    output = torch.empty_like(query)
    answer = decode_attention(
        _refuse, None, query, output, k_cache, v_cache, req_to_token, rows, lengths, None,
        scaling=0.3, sliding_window_size=window, enable_gqa=True, causal=False, is_cross_attn=False,
    )  # fmt: skip
    expected = _one_by_one(
        query,
        k_cache,
        v_cache,
        req_to_token=req_to_token,
        rows=rows,
        lengths=lengths,
        scale=0.3,
        window=window,
    )
    assert answer is output
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_encoder_decoder_models_keep_sglangs_own_function():
    calls = []
    decode_attention(
        lambda *args, **kwargs: calls.append((args, kwargs)),
        *"sqokvtrl", "encoder", scaling=0.5, sliding_window_size=None, is_cross_attn=True,
    )  # fmt: skip
    assert calls == [
        (
            (*tuple("sqokvtrl"), "encoder"),
            {"scaling": 0.5, "sliding_window_size": None, "is_cross_attn": True},
        )
    ]
