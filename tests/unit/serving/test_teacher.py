"""What a teacher behind a port may answer, against scripted answers. That real SGLang gives such answers: tests/e2e."""

import base64
import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_gkd.serving import (
    EngineError,
    EngineReplyInvalid,
    EngineRequestInvalid,
    EngineTimeout,
    StaleWeights,
    TeacherClient,
)
from tests.unit.serving.conftest import VOCAB_SIZE

IDS, START = [5, 6, 7, 8], 1  # rows for 7 and 8
KEPT_IDS = [[7, 3, VOCAB_SIZE - 1], [1, 2, 3]]
KEPT = [[-0.5, -1.5, -2.5], [-1.0, -1.0, -2.0]]
TOKEN_LOG_PROBS = [-0.5, -4.0]
LAST_ID = VOCAB_SIZE - 1


def encode(values: Any, dtype: str) -> str:
    return base64.b64encode(np.array(values, dtype).tobytes()).decode()


def answer(
    echoed: list[int] | None = None, kept_ids: Any = KEPT_IDS, kept: Any = KEPT, **changes: Any
) -> list[Any]:
    """The reply about ``IDS``; ``changes`` replace entries of its meta_info."""
    echoed = IDS[START:] if echoed is None else echoed
    rows = [[value, token, None] for value, token in zip([None, *TOKEN_LOG_PROBS], echoed, strict=False)]
    meta = {
        "weight_versions": [{"version": "default"}],
        "input_token_logprobs": rows,
        "input_top_logprobs_idx_flat_b64": encode(kept_ids, "<i4"),
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_val_flat_b64": encode(kept, "<f4"),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_shape": [2, 3],
        "input_top_logprobs_null_prefix": 1,
    }
    return [{"output_ids": [], "meta_info": {**meta, **changes}}]


@pytest.fixture
def make_teacher(faulty) -> Callable[..., TeacherClient]:
    def make(**changes: Any) -> TeacherClient:
        settings: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "top_k": 3,
            "requests_in_flight": 2,
            "request_timeout_s": 5.0,
            "max_retries": 2,
        }
        client = TeacherClient(faulty.url, **{**settings, **changes})
        client.weight_version = "default"
        return client

    return make


def test_the_rows_come_back_with_their_ids_and_values(faulty, make_teacher):
    faulty.scripts["/generate"] = [(200, answer())]
    (got,) = make_teacher().score_top_k([IDS], [START])
    assert got.ids_TK.tolist() == KEPT_IDS
    assert got.log_probs_TK.tolist() == KEPT
    assert got.token_log_probs_T.tolist() == TOKEN_LOG_PROBS


def test_only_the_rows_of_the_loss_are_asked_for_and_nothing_is_generated(faulty, make_teacher):
    faulty.scripts["/generate"] = [(200, answer())]
    make_teacher().score_top_k([IDS], [START])
    (body,) = faulty.bodies("/generate")
    assert body == {
        "input_ids": [IDS],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": START,
        "top_logprobs_num": 3,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }


def test_a_sequence_without_rows_is_not_asked_about(faulty, make_teacher):
    (got,) = make_teacher().score_top_k([IDS], [len(IDS) - 1])
    assert (got.ids_TK.shape, got.log_probs_TK.shape, got.token_log_probs_T.shape) == ((0, 3), (0, 3), (0,))
    assert make_teacher().score_top_k([], []) == []
    assert faulty.requests == []


def test_the_last_id_of_the_vocabulary_is_echoed_as_0_but_stands_in_the_rows(faulty, make_teacher):
    faulty.scripts["/generate"] = [(200, answer([6, 0, 8], kept_ids=[[LAST_ID, 3, 0], [1, 2, 3]]))]
    (got,) = make_teacher().score_top_k([[5, 6, LAST_ID, 8]], [START])
    assert got.ids_TK[0, 0] == LAST_ID


def changed(row: int, column: int, value: float, table: Any = KEPT) -> Any:
    table = copy.deepcopy(table)
    table[row][column] = value
    return table


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([], "received 0 answers"),
        (answer() * 2, "received 2 answers"),
        (answer([6, 7, 9]), "other ids than were sent"),
        (answer([6, 7]), "other ids than were sent"),
        (answer(input_top_logprobs_shape=[3, 3]), r"shape \[3, 3\] after 1 empty rows, asked for \[2, 3\]"),
        (answer(input_top_logprobs_shape=[2, 2]), "asked for"),
        (answer(input_top_logprobs_shape=None), "shape None"),
        (answer(input_top_logprobs_null_prefix=0), "after 0 empty rows"),
        (answer(input_top_logprobs_val_flat_b64=None), "val_flat_b64 is NoneType"),
        (answer(input_top_logprobs_val_flat_b64_dtype="float16"), "of float16, not base64 of float32"),
        (answer(input_top_logprobs_idx_flat_b64="!!!!"), "idx_flat_b64 is not base64"),
        (answer(input_top_logprobs_idx_flat_b64=encode([1, 2, 3], "<i4")), "12 bytes, 2 x 3 entries need 24"),
        (answer(kept_ids=changed(1, 0, VOCAB_SIZE, KEPT_IDS)), r"row 1 of 2 .* ids outside \[0, 50\)"),
        (answer(kept_ids=changed(0, 2, -1, KEPT_IDS)), "row 0 .* ids outside"),
        (answer(kept_ids=changed(1, 2, 1, KEPT_IDS)), "row 1 .* an id twice"),
        (answer(kept=changed(0, 2, float("nan"))), "row 0 .* not finite"),
        (answer(kept=changed(1, 2, -float("inf"))), "row 1 .* not finite"),
        (answer(kept=changed(1, 1, -0.9)), "row 1 .* not sorted"),
        (answer(kept=[KEPT[0], [-0.5, -0.5, -3.0]]), "row 1 .* mass above 1"),
        (
            answer(kept=[KEPT[1], KEPT[0]]),
            "row 0 .* log-prob of the next token that differs from input_token_logprobs",
        ),
        (
            answer(kept=changed(1, 2, -4.5)),
            "row 1 .* log-prob of the next token that differs from input_token_logprobs",
        ),
        (answer(input_token_logprobs=None), "no list of input_token_logprobs"),
        (answer(weight_versions=None), "weight_versions"),
        (answer(finish_reason={"type": "abort", "message": "too long"}), "aborted.*too long"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_refused(faulty, make_teacher, reply, message):
    faulty.scripts["/generate"] = [(200, reply)]
    with pytest.raises(EngineReplyInvalid, match=message):
        make_teacher().score_top_k([IDS], [START])
    assert len(faulty.requests) == 1


def test_rounding_is_no_reason_to_refuse(faulty, make_teacher):
    almost = [
        [-0.0, -8.0, -9.0],
        [-1.0, -1.0, -4.0 + 1e-6],
    ]  # a mass of 1.0005; the kept token is the last one
    faulty.scripts["/generate"] = [
        (
            200,
            answer(
                kept_ids=[[7, 3, 4], [1, 2, 8]],
                kept=almost,
                input_token_logprobs=[[None, 6], [0.0, 7], [-4.0, 8]],
            ),
        )
    ]
    assert len(make_teacher().score_top_k([IDS], [START])) == 1


def test_a_teacher_whose_weights_change_is_refused(faulty, make_teacher):
    faulty.scripts["/generate"] = [(200, answer(weight_versions=[{"version": "1"}]))]
    with pytest.raises(StaleWeights, match="changed during the run; give it a server of its own"):
        make_teacher().score_top_k([IDS], [START])


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[5, VOCAB_SIZE]], [0], "outside"),
        ([[]], [0], "empty"),
        ([[5, 6]], [2], "not a position"),
        ([[5, 6]], [-1], "not a position"),
    ],
)
def test_what_would_kill_the_server_is_never_sent(faulty, make_teacher, sequences, starts, message):
    with pytest.raises(EngineRequestInvalid, match=message):
        make_teacher().score_top_k(sequences, starts)
    assert faulty.requests == []


@pytest.mark.parametrize("top_k", [0, VOCAB_SIZE + 1])
def test_more_entries_than_the_vocabulary_has_are_never_asked_for(make_teacher, top_k):
    with pytest.raises(EngineRequestInvalid, match=r"not in \[1, vocab_size=50\]"):
        make_teacher(top_k=top_k)


def test_requests_overlap_up_to_the_limit_and_rows_stay_with_their_sequences(faulty, make_teacher):
    running, most, lock, both = 0, [0], threading.Lock(), threading.Barrier(2, timeout=5)

    def serve():
        nonlocal running
        with lock:
            running += 1
            most[0] = max(most[0], running)
        both.wait()  # passes only when two requests are here at the same time
        with lock:
            running -= 1
        return 200, answer()

    faulty.scripts["/generate"] = [serve]
    got = make_teacher().score_top_k([IDS] * 6, [START] * 6)
    assert len(got) == 6
    assert most[0] == 2


def test_each_sequence_gets_the_answer_about_itself(faulty, make_teacher):
    """The second request is answered first; an answer about another sequence would not echo its ids."""
    first_may_answer = threading.Event()

    def about(ids: list[int]) -> list[Any]:
        return answer(ids[START:], kept_ids=[[ids[2], 3, 4], [1, 2, 3]])

    def serve():
        (ids,) = faulty.asked.body["input_ids"]
        if ids == IDS:
            first_may_answer.wait(5)
        else:
            first_may_answer.set()
        return 200, about(ids)

    faulty.scripts["/generate"] = [serve]
    other = [9, 16, 17, 18]
    got = make_teacher().score_top_k([IDS, other], [START, START])
    assert [rows.ids_TK[0, 0] for rows in got] == [7, 17]


def test_a_busy_server_is_asked_again_but_not_for_ever(faulty, make_teacher):
    faulty.scripts["/generate"] = [(503, b"busy"), (500, b"oops"), (200, answer())]
    assert len(make_teacher(max_retries=2).score_top_k([IDS], [START])) == 1
    faulty.scripts["/generate"] = [(503, b"busy")]
    with pytest.raises(EngineError, match=r"failed 3 times.*busy"):
        make_teacher(max_retries=2).score_top_k([IDS], [START])


def test_after_a_failure_no_further_sequence_is_asked_about(faulty, make_teacher):
    faulty.scripts["/generate"] = [(400, b"refused")]
    with pytest.raises(EngineReplyInvalid, match="refused"):
        make_teacher(requests_in_flight=1).score_top_k([IDS] * 50, [START] * 50)
    assert len(faulty.requests) < 50


def test_a_hanging_teacher_is_given_up_at_the_deadline(faulty, make_teacher):
    release = threading.Event()
    faulty.scripts["/generate"] = [lambda: (release.wait(5), (200, answer()))[1]]
    start = time.monotonic()
    with pytest.raises(EngineTimeout, match=r"no reply within 0\.2 s.*request_timeout_s"):
        make_teacher(request_timeout_s=0.2).score_top_k([IDS], [START])
    assert time.monotonic() - start < 4
    release.set()


MODEL_INFO = {
    "model_path": "/models/t",
    "model_type": "llama",
    "is_generation": True,
    "weight_version": "default",
}
SERVER_INFO = {"version": "0.5.23", "enable_deterministic_inference": False, "max_req_input_len": 20}
NAMES_ITS_VOCABULARY = {"error": {"message": "out-of-vocabulary token id; valid range is [0, 50)."}}


@pytest.fixture
def teaching(faulty):
    """A server that passes every check."""
    faulty.scripts |= {
        "/model_info": [(200, MODEL_INFO)],
        "/server_info": [(200, SERVER_INFO)],
        "/generate": [(400, NAMES_ITS_VOCABULARY)],
    }
    return faulty


def check(client: TeacherClient) -> str:
    return client.check_model(model_type="llama", num_sequence_tokens=20)


def test_the_expected_model_is_accepted_and_its_weights_are_noted(teaching, make_teacher):
    client = make_teacher()
    client.weight_version = None
    assert check(client) == "/models/t"
    assert client.weight_version == "default"


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("/model_info", (200, {**MODEL_INFO, "model_type": "qwen3"}), "of type 'qwen3'.*expected is 'llama'"),
        ("/model_info", (200, {**MODEL_INFO, "is_generation": False}), "is_generation=False"),
        ("/generate", (400, {"error": "valid range is [0, 51)."}), "vocab_size=51, expected is 50"),
        ("/generate", (400, {"error": "no"}), "status 400"),
        ("/generate", (200, []), "does not report its vocabulary size"),
        ("/server_info", (200, {**SERVER_INFO, "max_req_input_len": 19}), "sequences of 19 tokens.*are 20"),
    ],
)
def test_another_model_or_vocabulary_or_a_short_context_is_refused(
    teaching, make_teacher, path, reply, message
):
    teaching.scripts[path] = [reply]
    with pytest.raises(EngineReplyInvalid, match=message):
        check(make_teacher())
