"""The client's guard rails, against scripted answers. That real SGLang gives such answers is checked in tests/e2e."""

import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from megatron_gkd.serving import (
    Completion,
    EngineDied,
    EngineError,
    EngineReplyInvalid,
    EngineTimeout,
    Sampling,
    SglangClient,
    StaleWeights,
)
from tests.unit.serving.conftest import VOCAB_SIZE, answer

SAMPLING = Sampling(max_new_tokens=3, stop_token_ids=(2,))
STOPPED = {"type": "stop", "matched": 2}


def generate(client, sampling=SAMPLING, **more):
    return client.generate([[5, 6], [7]], seeds=[10, 11], sampling=sampling, **more)


def test_one_request_carries_all_prompts_with_their_seeds_and_sampling_settings(faulty, make_client):
    faulty.scripts["/generate"] = [(200, [answer([1, 1, 1]), answer([4, 2], reason=STOPPED)])]
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=3, stop_token_ids=(2,))
    got = generate(make_client(), sampling)
    assert got == [Completion((1, 1, 1), "length", 3), Completion((4, 2), "stop", 3)]
    (body,) = faulty.bodies("/generate")
    common = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 3, "stop_token_ids": [2]}
    assert body == {
        "input_ids": [[5, 6], [7]],
        "sampling_params": [{**common, "sampling_seed": 10}, {**common, "sampling_seed": 11}],
    }


def test_no_prompts_need_no_request(faulty, make_client):
    assert make_client().generate([], seeds=[], sampling=SAMPLING) == []
    assert faulty.requests == []


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([[5], [VOCAB_SIZE]], [1, 2], "outside"),
        ([[5], [-1]], [1, 2], "outside"),
        ([[5], [1.0]], [1, 2], "outside"),
        ([[5], []], [1, 2], "empty"),
        ([[5], [6]], [1, 1], "repeat"),
        ([[5], [6]], [1], "as many seeds"),
        ([[5], [6]], [1, 2**63], "seed"),
        ([[5], [6]], [1, -1], "seed"),
    ],
)
def test_what_would_kill_the_server_or_repeat_a_sample_is_never_sent(
    faulty, make_client, prompts, seeds, message
):
    with pytest.raises(ValueError, match=message):
        make_client().generate(prompts, seeds=seeds, sampling=SAMPLING)
    assert faulty.requests == []


GOOD = answer([1, 1, 1])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"output_ids": []}, "sent 2 prompts, received dict"),
        ([GOOD], "received 1 answers"),
        ([GOOD, "text"], "no meta_info"),
        ([GOOD, {"output_ids": [1]}], "no meta_info"),
        ([GOOD, answer([1, 1, VOCAB_SIZE])], "outside"),
        ([GOOD, answer([1, 1, -1])], "outside"),
        ([GOOD, answer([1, True, 1])], "outside"),
        ([GOOD, {**GOOD, "output_ids": None}], "outside"),
        ([GOOD, answer([1, 1])], "context length is too small"),
        ([GOOD, answer([1, 2, 1])], "continues after stop token 2"),
        ([GOOD, answer([1, 1, 1, 2], reason=STOPPED)], "4 tokens, more than max_new_tokens=3"),
        ([GOOD, answer([1, 1], reason=STOPPED)], "reports stop token 2"),
        ([GOOD, answer([2, 1, 2], reason=STOPPED)], "reports stop token 2"),
        ([GOOD, answer([], reason=STOPPED)], "reports stop token 2"),
        ([GOOD, answer([1], reason={"type": "stop", "matched": "text"})], "not a token id"),
        ([GOOD, answer([1], reason={"type": "abort", "message": "out of memory"})], "aborted.*out of memory"),
        ([GOOD, answer([1], reason={"type": "other"})], "finish_reason"),
        ([GOOD, answer([1], reason="length")], "finish_reason"),
        ([GOOD, {**GOOD, "meta_info": {"finish_reason": {"type": "length"}}}], "weight_versions"),
    ],
)
def test_a_reply_that_breaks_the_contract_is_refused(faulty, make_client, reply, message):
    faulty.scripts["/generate"] = [(200, reply)]
    with pytest.raises(EngineReplyInvalid, match=message):
        generate(make_client())


def test_a_stop_token_that_only_the_server_knows_is_kept(faulty, make_client):
    stopped_at_9 = answer([1, 9], reason={"type": "stop", "matched": 9})
    faulty.scripts["/generate"] = [(200, [GOOD, stopped_at_9])]
    assert generate(make_client())[1].ids == (1, 9)


@pytest.mark.parametrize("versions", [("2",), ("2", "3"), ("default",)])
def test_another_weight_version_or_a_second_one_is_stale(faulty, make_client, versions):
    faulty.scripts["/generate"] = [(200, [GOOD, answer([1, 1, 1], versions=versions)])]
    with pytest.raises(StaleWeights, match="expected only 3"):
        generate(make_client())


def test_a_server_whose_weights_are_unknown_is_not_asked(faulty, make_client):
    with pytest.raises(StaleWeights, match="push the weights"):
        generate(make_client(weight_version=None))
    assert faulty.requests == []


def test_an_answer_of_500_is_repeated_until_it_succeeds(faulty, make_client):
    faulty.scripts["/generate"] = [(500, b"oops"), (503, b"busy"), (200, [GOOD, GOOD])]
    assert len(generate(make_client(max_retries=2))) == 2
    assert len(faulty.requests) == 3
    assert faulty.bodies("/generate")[0] == faulty.bodies("/generate")[2]


def test_repetitions_are_bounded(faulty, make_client):
    faulty.scripts["/generate"] = [(500, b"oops")]
    with pytest.raises(EngineError, match=r"failed 3 times.*oops"):
        generate(make_client(max_retries=2))
    assert len(faulty.requests) == 3


def test_a_refused_request_is_not_repeated(faulty, make_client):
    faulty.scripts["/generate"] = [(400, {"error": "temperature"})]
    with pytest.raises(EngineReplyInvalid, match=r"status 400.*temperature"):
        generate(make_client())
    assert len(faulty.requests) == 1


def test_an_answer_that_is_not_json_is_refused(faulty, make_client):
    faulty.scripts["/generate"] = [(200, b"<html>proxy error</html>")]
    with pytest.raises(EngineReplyInvalid, match="proxy error"):
        generate(make_client())


def test_a_redirect_is_not_followed(faulty, make_client):
    faulty.scripts["/generate"] = [(302, b"elsewhere")]
    with pytest.raises(EngineReplyInvalid, match="status 302"):
        generate(make_client())


def test_a_hanging_server_times_out_and_is_not_asked_again(faulty, make_client):
    release = threading.Event()
    faulty.scripts["/generate"] = [lambda: (release.wait(5), (200, []))[1]]
    start = time.monotonic()
    with pytest.raises(EngineTimeout, match=r"no reply within 0\.2 s.*request_timeout_s"):
        generate(make_client(request_timeout_s=0.2))
    assert time.monotonic() - start < 4
    assert len(faulty.requests) == 1
    release.set()


def test_an_unreachable_server_is_named():
    client = SglangClient(
        "http://127.0.0.1:9", vocab_size=9, request_timeout_s=1, max_retries=1, weight_version=0
    )
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/generate failed 2 times"):
        generate(client)


def test_a_process_that_dies_during_a_request_is_noticed_long_before_the_time_out(faulty, make_client):
    release, sent = threading.Event(), threading.Event()

    def hang():
        sent.set()
        release.wait(30)
        return 200, []

    def is_alive():
        if sent.is_set():
            raise EngineDied("exit code -9")

    faulty.scripts["/generate"] = [hang]
    start = time.monotonic()
    with pytest.raises(EngineDied, match="exit code -9"):
        generate(make_client(is_alive=is_alive, request_timeout_s=60))
    assert time.monotonic() - start < 5
    release.set()


def test_a_dead_process_is_noticed_instead_of_a_repetition():
    calls = []

    def is_alive():
        calls.append(1)
        if len(calls) > 1:
            raise EngineDied("gone")

    client = SglangClient(
        "http://127.0.0.1:9",
        vocab_size=9,
        request_timeout_s=1,
        max_retries=5,
        is_alive=is_alive,
        weight_version=0,
    )
    with pytest.raises(EngineDied, match="gone"):
        generate(client)


def test_a_proxy_of_the_environment_does_not_see_the_traffic(faulty, make_client, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    faulty.scripts["/generate"] = [(200, [GOOD, GOOD])]
    assert len(generate(make_client(max_retries=0))) == 2


def test_the_api_key_is_sent_as_bearer_token(faulty, make_client):
    faulty.scripts["/generate"] = [(200, [GOOD, GOOD])]
    generate(make_client(api_key="secret"))
    assert faulty.requests[0][2]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://host:1", "http://"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="http://host:port"):
        SglangClient(url, vocab_size=9, request_timeout_s=1, max_retries=0)


def scored(ids, values, version="3"):
    rows = [[value, token, None] for value, token in zip(values, ids, strict=True)]
    return {
        "output_ids": [],
        "meta_info": {"weight_versions": [{"version": version}], "input_token_logprobs": rows},
    }


def test_score_returns_one_value_less_than_tokens_and_asks_from_the_first(faulty, make_client):
    faulty.scripts["/generate"] = [(200, [scored([5, 6, 7], [None, -1.5, -2]), scored([8], [None])])]
    assert make_client().score([[5, 6, 7], [8]]) == [(-1.5, -2.0), ()]
    (body,) = faulty.bodies("/generate")
    assert body["logprob_start_len"] == 0
    assert body["sampling_params"]["max_new_tokens"] == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (scored([5, 6], [None, None]), "not a finite number"),
        (scored([5, 6], [None, float("nan")]), "not a finite number"),
        (scored([5, 6], [None, float("-inf")]), "not a finite number"),
        (scored([5, 9], [None, -1.0]), "other ids"),
        (scored([5], [None]), "other ids"),
        ({"meta_info": {"weight_versions": [{"version": "3"}]}}, "input_token_logprobs"),
    ],
)
def test_a_score_that_breaks_the_contract_is_refused(faulty, make_client, entry, message):
    faulty.scripts["/generate"] = [(200, [entry])]
    with pytest.raises(EngineReplyInvalid, match=message):
        make_client().score([[5, 6]])


def test_a_score_by_other_weights_is_stale(faulty, make_client):
    faulty.scripts["/generate"] = [(200, [scored([5, 6], [None, -1.0], version="2")])]
    with pytest.raises(StaleWeights):
        make_client().score([[5, 6]])


@pytest.fixture
def weights(tmp_path):
    save_file({"a": torch.ones(5, 7)}, tmp_path / "model.safetensors")
    return tmp_path


def test_an_update_counts_only_when_the_server_reports_the_version(faulty, make_client, weights):
    faulty.scripts["/update_weights_from_disk"] = [(200, {"success": True, "message": "ok"})]
    faulty.scripts["/flush_cache"] = [(200, b"Cache flushed.")]
    faulty.scripts["/model_info"] = [(200, {"weight_version": "4"})]
    client = make_client()
    client.update_weights_from_disk(weights, 4)
    assert client.weight_version == 4
    (body,) = faulty.bodies("/update_weights_from_disk")
    assert body == {
        "model_path": str(weights.resolve()),
        "load_format": "safetensors",
        "weight_version": "4",
        "flush_cache": False,
    }
    assert faulty.bodies("/flush_cache") == [{}], "cached keys and values are of the old weights"
    with pytest.raises(StaleWeights, match="reports success but version 4"):
        client.update_weights_from_disk(weights, 5)
    assert client.weight_version is None


def test_an_update_waits_for_requests_that_still_run_before_it_flushes_the_cache(
    faulty, make_client, weights
):
    faulty.scripts["/update_weights_from_disk"] = [(200, {"success": True})]
    faulty.scripts["/flush_cache"] = [(400, b"Flush cache failed.")]
    faulty.scripts["/flush_cache?timeout=30"] = [(200, b"Cache flushed."), (400, b"Timed out waiting")]
    faulty.scripts["/model_info"] = [(200, {"weight_version": "4"})]
    client = make_client()
    client.update_weights_from_disk(weights, 4)
    assert client.weight_version == 4
    with pytest.raises(EngineReplyInvalid, match="Timed out waiting"):
        client.update_weights_from_disk(weights, 4)
    assert client.weight_version is None


@pytest.mark.parametrize("reply", [{"success": False, "message": "bad file"}, {}, None, "ok"])
def test_an_update_that_did_not_succeed_leaves_the_weights_unknown(faulty, make_client, weights, reply):
    faulty.scripts["/update_weights_from_disk"] = [(200, reply)]
    client = make_client()
    with pytest.raises(EngineReplyInvalid, match="did not succeed"):
        client.update_weights_from_disk(weights, 4)
    with pytest.raises(StaleWeights, match="push the weights"):
        generate(client)


@pytest.mark.parametrize("damage", ["no folder", "no file", "no tensor", "text", "truncated", "longer"])
def test_files_that_would_kill_the_server_are_not_handed_to_it(faulty, make_client, weights, damage):
    file, folder = weights / "model.safetensors", weights
    content = file.read_bytes()
    if damage == "no folder":
        folder = weights / "nowhere"
    elif damage == "no file":
        file.unlink()
    elif damage == "no tensor":
        save_file({}, file)
    else:
        file.write_bytes({"text": b"text", "truncated": content[:-1], "longer": content + b"."}[damage])
    client = make_client()
    with pytest.raises(ValueError, match=r"does not exist|holds no|would kill the server"):
        client.update_weights_from_disk(folder, 4)
    assert faulty.requests == []
    assert client.weight_version == 3


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"enable_deterministic_inference": False}, "ignores seeds"),
        ({}, "ignores seeds"),
        ({"enable_deterministic_inference": True, "max_req_input_len": 99}, "sequences of 99 tokens"),
    ],
)
def test_a_server_that_would_spoil_the_results_silently_is_refused(faulty, make_client, info, message):
    faulty.scripts["/server_info"] = [(200, {"version": "0.5.23", **info})]
    with pytest.raises(EngineReplyInvalid, match=message):
        make_client().check_settings(num_sequence_tokens=100)


def test_an_untested_release_of_sglang_is_named_in_a_warning(faulty, make_client, caplog):
    info = {"version": "0.6.0", "enable_deterministic_inference": True, "max_req_input_len": 100}
    faulty.scripts["/server_info"] = [(200, info)]
    make_client().check_settings(num_sequence_tokens=100)
    assert "0.6.0" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}, {"max_new_tokens": 0}]
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
