"""The rows that a server tells arrive in order on every rank of the student's last stage, and so does its failure.

Not here: the server itself (tests/e2e/test_teacher_server), what it may answer (tests/unit/serving/test_teacher).

Shapes: T = rows, K = entries per row.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_gkd.data.sample import Batch, MicroBatch, Sample
from megatron_gkd.serving import EngineError, EngineTimeout, TeacherClient, TopKLogProbs
from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, TP2_SP, Split, student_groups
from tests.support.run_parts import make_batch
from tests.support.tiny_models import PAD_ID

TOP_K = 3
VOCAB_SIZE = 240  # of the student; the answers go beyond it


class AnsweringClient(TeacherClient):
    """Answers from the ids alone, so that every row can be told from every other; fails where it is told to."""

    def __init__(self, failures: dict[int, Exception], rank: int):
        super().__init__(
            "http://127.0.0.1:9",
            vocab_size=1000,
            top_k=TOP_K,
            requests_in_flight=1,
            request_timeout_s=1,
            max_retries=0,
        )
        self.failure = failures.get(rank)
        self.asked: list[Sequence[int]] = []

    def check_model(self, *, model_type, num_sequence_tokens):
        assert (model_type, num_sequence_tokens) == ("llama", 64)
        return "/models/t"

    def score_top_k(self, sequences, starts):
        if self.failure is not None:
            raise self.failure
        self.asked += sequences
        return [self._rows(ids, start) for ids, start in zip(sequences, starts, strict=True)]

    def _rows(self, ids, start):
        ids_T = np.array(ids[start + 1 :], np.int32)
        offsets_TK = np.arange(TOP_K)[None, :]
        return TopKLogProbs(
            ids_T[:, None] + offsets_TK.astype(np.int32), _values(ids_T[:, None] + offsets_TK), _values(ids_T)
        )


def _values(ids: np.ndarray) -> np.ndarray:
    return -ids.astype(np.float32) / 7


@pytest.mark.parametrize(
    ("num_ranks", "split"), [(2, TP2), (2, PP2), (2, DP), (2, TP2_SP), (4, TP2_PP2), (4, TP2)], ids=str
)
def test_every_rank_of_the_last_stage_gets_the_rows_of_its_micro_batches(
    run_on_ranks, num_ranks, split: Split
):
    run_on_ranks(num_ranks, _score, split)


@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2), (2, PP2), (2, DP), (4, TP2_PP2)], ids=str)
def test_a_failure_of_one_that_asks_is_raised_on_all_ranks(run_on_ranks, num_ranks, split: Split):
    run_on_ranks(num_ranks, _fail, split)


def _score(rank: int, world_size: int, split: Split) -> None:
    with student_groups(split) as groups:
        batch = _with_odd_prompts(make_batch(0))
        client = AnsweringClient({}, rank)
        micro_batches = _micro_batches(batch, groups)
        teacher = _make_teacher(client, groups)
        assert teacher.served_folder == "/models/t"
        signals = teacher.score(batch, micro_batches)
        if not groups.is_last_stage:
            assert (signals, client.asked) == ([], [])
            return
        assert bool(client.asked) == (groups.tp_rank == 0)
        assert len(signals) == len(micro_batches)
        for signal, micro_batch in zip(signals, micro_batches, strict=True):
            assert signal.token_log_prob_T is not None
            ids_T = torch.tensor(
                [token for i in micro_batch.indices for token in _counted_ids(batch.samples[i])],
                dtype=torch.int64,
            )
            ids_TK = ids_T[:, None] + torch.arange(TOP_K)
            assert torch.equal(signal.ids_TK, torch.where(ids_TK < VOCAB_SIZE, ids_TK, -1))
            assert torch.equal(signal.log_probs_TK, torch.from_numpy(_values(ids_TK.numpy())))
            assert torch.equal(signal.token_log_prob_T, torch.from_numpy(_values(ids_T.numpy())))


def _with_odd_prompts(batch: Batch) -> Batch:
    """The first sample's prompt counts in part, and the teacher reads another prompt than the student in the second."""
    first, second, *others = batch.samples
    first = replace(first, prompt_loss_mask=(False, True, False, True))
    second = replace(second, teacher_prompt_ids=(7, 8, 9, 10, 11))
    return Batch((first, second, *others))


def _counted_ids(sample: Sample) -> list[int]:
    counted = zip(sample.prompt_ids, sample.prompt_loss_mask, strict=False)
    return [token for token, counts in counted if counts] + list(sample.completion_ids)


def _fail(rank: int, world_size: int, split: Split) -> None:
    with student_groups(split) as groups:
        batch = make_batch(0)
        last_to_ask = groups.layout.last_stage_ranks(groups.layout.dp_size - 1)[0]
        for failure, kind in (
            (EngineTimeout("no answer"), EngineTimeout),
            (KeyError("no answer"), EngineError),
        ):
            teacher = _make_teacher(AnsweringClient({last_to_ask: failure}, rank), groups)
            with pytest.raises(kind, match="no answer"):
                teacher.score(batch, _micro_batches(batch, groups))


def _make_teacher(client: TeacherClient, groups):
    from megatron_gkd.teacher.server import ServerTeacher

    return ServerTeacher(
        client,
        model_type="llama",
        num_sequence_tokens=64,
        vocab_size=VOCAB_SIZE,
        groups=groups,
        device=torch.device("cpu"),
    )


def _micro_batches(batch: Batch, groups) -> list[MicroBatch]:
    return batch.micro_batches(
        2,
        dp_rank=groups.dp_rank,
        dp_size=groups.layout.dp_size,
        seq_length=batch.padded_length(2),
        pad_id=PAD_ID,
    )
