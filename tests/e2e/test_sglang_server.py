"""Our client and process control against real SGLang. Faults that a real server cannot be asked for: tests/unit/serving."""

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_gkd.platform.device import detect_platform
from megatron_gkd.serving import (
    EngineDied,
    EngineError,
    EngineReplyInvalid,
    Sampling,
    ServerProcess,
    ServerSettings,
    SglangClient,
    StaleWeights,
)
from tests.e2e.conftest import CONTEXT_LENGTH, START_TIMEOUT_S, server_processes
from tests.support.processes import ROOT, running, wait_until_gone
from tests.support.tiny_models import EOS_ID, TOKENIZER_SIZE, write_tiny_model

pytestmark = pytest.mark.timeout(400)

PROMPTS = [[5, 6, 7], [100], [30, 20, 10, 40, 50]]
SEQUENCES = [[5, 6, 7, 8, 9, 200], [100, 3], [30, 20, 10, 40, 50, 60, 70, 80]]


@pytest.fixture
def client(sglang_server: ServerProcess, sglang_model: Path) -> Iterator[SglangClient]:
    client = make_client(sglang_server)
    yield client
    if client.weight_version != 0:
        client.update_weights_from_disk(sglang_model, 0)


def make_client(server: ServerProcess) -> SglangClient:
    return server.client(vocab_size=TOKENIZER_SIZE, request_timeout_s=60, max_retries=1)


def hf_log_probs(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the second to the last token, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = []
    for ids in sequences:
        with torch.no_grad():
            log_probs_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        results.append(log_probs_SV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return results


def largest_difference(scores, expected) -> float:
    pairs = zip(scores, expected, strict=True)
    return max((torch.tensor(got) - want).abs().max().item() for got, want in pairs)


def test_the_server_honours_seeds_and_takes_whole_sequences(client):
    client.check_settings(num_sequence_tokens=CONTEXT_LENGTH)
    with pytest.raises(EngineReplyInvalid, match="--context-length"):
        client.check_settings(num_sequence_tokens=CONTEXT_LENGTH + 1)


def test_the_same_seeds_give_the_same_ids_and_other_seeds_others(client):
    sampling = Sampling(max_new_tokens=20)
    first = client.generate(PROMPTS, seeds=[1, 2, 3], sampling=sampling)
    assert client.generate(PROMPTS, seeds=[1, 2, 3], sampling=sampling) == first
    other = client.generate(PROMPTS, seeds=[4, 5, 6], sampling=sampling)
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))
    copies = client.generate([PROMPTS[0]] * 4, seeds=[1, 2, 3, 4], sampling=sampling)
    assert len({c.ids for c in copies}) == 4


def test_greedy_ids_equal_transformers(client, sglang_model):
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32)
    got = client.generate(PROMPTS, seeds=[1, 2, 3], sampling=Sampling(temperature=0, max_new_tokens=16))
    for prompt, completion in zip(PROMPTS, got, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert completion.ids == tuple(expected[0, len(prompt) :].tolist())


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.6}, {"top_k": 3}])
def test_samples_follow_the_models_distribution(client, sglang_model, limits):
    count, temperature = 500, 0.7
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32)
    with torch.no_grad():
        probs_V = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    sorted_V, order_V = probs_V.sort(descending=True)
    mass_before_V = sorted_V.cumsum(0) - sorted_V
    num_kept = limits.get("top_k") or int((mass_before_V <= limits.get("top_p", 1.0)).sum())
    kept_V = torch.zeros_like(probs_V).scatter(0, order_V[:num_kept], sorted_V[:num_kept])
    kept_V /= kept_V.sum()
    assert kept_V.max() < 0.97, "the distribution must not be too narrow to tell"
    sampling = Sampling(temperature=temperature, max_new_tokens=1, **limits)
    got = client.generate([PROMPTS[0]] * count, seeds=list(range(count)), sampling=sampling)
    share_V = torch.bincount(torch.tensor([c.ids[0] for c in got]), minlength=TOKENIZER_SIZE) / count
    assert (share_V[kept_V == 0] == 0).all()
    bound_V = 5 * (kept_V * (1 - kept_V) / count).sqrt() + 2 / count  # five standard deviations
    assert ((share_V - kept_V).abs() <= bound_V).all()


def test_a_stopped_completion_ends_with_its_stop_token_and_the_others_have_none(client):
    stops = tuple(range(0, TOKENIZER_SIZE, 8))
    sampling = Sampling(max_new_tokens=12, stop_token_ids=stops)
    completions = client.generate([PROMPTS[0]] * 16, seeds=list(range(16)), sampling=sampling)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        assert not set(completion.ids[:-1]) & set(stops)
        assert (completion.ids[-1] in (*stops, EOS_ID)) == (completion.finish_reason == "stop")


def test_a_sequence_may_fill_the_context_and_one_that_does_not_fit_is_an_error(client):
    sampling = Sampling(temperature=0, max_new_tokens=28)
    prompt = [7] * (CONTEXT_LENGTH - sampling.max_new_tokens)
    (completion,) = client.generate([prompt], seeds=[1], sampling=sampling)
    assert len(completion.ids) == sampling.max_new_tokens
    with pytest.raises(EngineReplyInvalid, match="context length"):
        client.generate([[*prompt, *prompt[:20]]], seeds=[1], sampling=sampling)


def test_scores_equal_transformers(client, sglang_model):
    assert largest_difference(client.score(SEQUENCES), hf_log_probs(sglang_model, SEQUENCES)) < 1e-4


def test_an_update_from_disk_brings_the_new_model_under_its_version(client, sglang_server, tmp_path):
    client.score(SEQUENCES)  # so that old keys and values could be in the server's cache
    new = write_tiny_model(tmp_path / "new", seed=1)
    client.update_weights_from_disk(new, 1)
    assert client.model_info()["weight_version"] == "1"
    assert largest_difference(client.score(SEQUENCES), hf_log_probs(new, SEQUENCES)) < 1e-4
    assert client.generate([[5]], seeds=[1], sampling=Sampling(max_new_tokens=2))[0].weight_version == 1
    with pytest.raises(StaleWeights, match="expected only 0"):
        make_client(sglang_server).score([[5, 6]])


def test_an_update_right_after_a_health_check_is_not_refused(client, sglang_model):
    for version in range(1, 4):
        assert requests.get(f"{client.url}/health", timeout=30).ok
        client.update_weights_from_disk(sglang_model, version)
    assert largest_difference(client.score(SEQUENCES), hf_log_probs(sglang_model, SEQUENCES)) < 1e-4


def test_an_update_without_a_layer_is_a_success_to_the_server(client, sglang_model, tmp_path):
    """SGLang keeps the old layer and says nothing, so whoever pushes must count the tensors and compare a probe."""
    write_tiny_model(tmp_path / "new", seed=1)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    assert 0 < len(kept) < len(tensors)
    (tmp_path / "part").mkdir()
    save_file(kept, tmp_path / "part" / "model.safetensors")
    client.update_weights_from_disk(tmp_path / "part", 2)
    assert client.model_info()["weight_version"] == "2"
    scores = client.score(SEQUENCES)
    assert largest_difference(scores, hf_log_probs(tmp_path / "new", SEQUENCES)) > 1e-2
    assert largest_difference(scores, hf_log_probs(sglang_model, SEQUENCES)) > 1e-2


def test_two_ranks_score_pushed_weights_and_their_death_is_seen_in_five_seconds(sglang_model, tmp_path):
    settings = ServerSettings(
        sglang_model,
        4000,
        dtype="float32",
        on_cpu=detect_platform().is_cpu,
        num_threads=1,
        tp_size=2,
        has_random_weights=True,
    )
    server = ServerProcess.start(settings, log_file=tmp_path / "log", start_timeout_s=START_TIMEOUT_S)
    processes = server_processes(server)
    try:
        client = make_client(server)
        with pytest.raises(StaleWeights, match="push the weights"):
            client.score(SEQUENCES)
        client.update_weights_from_disk(sglang_model, 1)
        assert largest_difference(client.score(SEQUENCES), hf_log_probs(sglang_model, SEQUENCES)) < 1e-4
        main = psutil.Process(server.pid).children()[0]
        killed_at = []

        def kill():
            main.kill()
            killed_at.append(time.monotonic())

        threading.Timer(1.0, kill).start()
        endless = Sampling(max_new_tokens=3900)
        with pytest.raises(EngineDied, match=r"(.|\n)*signal 9") as caught:
            client.generate(PROMPTS, seeds=[1, 2, 3], sampling=endless)
        assert killed_at, "the request ended before the server was killed"
        assert time.monotonic() - killed_at[0] < 5
        assert "POST /generate" in str(caught.value), "the message carries the end of the server's log"
        assert not running(processes)
    finally:
        server.stop()


def test_a_server_does_not_outlive_the_process_that_started_it(sglang_model, tmp_path):
    """Through launch/serve.py, killed as torchrun kills its workers in the end. Its key stays with this user."""
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--model", str(sglang_model)]
    command += ["--context-length", "64", "--num-threads", "1", "--log-file", str(tmp_path / "log")]
    command += ["--api-key-env", "GKD_KEY"]
    key = secrets.token_hex()
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GKD_KEY": key}
    environment |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    launcher = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert launcher.stdout is not None
        url = launcher.stdout.readline().strip()
        client = SglangClient(
            url, vocab_size=TOKENIZER_SIZE, request_timeout_s=30, max_retries=0, weight_version=0, api_key=key
        )
        assert len(client.score(SEQUENCES)) == len(SEQUENCES)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        assert len(processes) >= 3
        assert not [p for p in processes if any(key in word for word in p.cmdline())]
        assert not list(tmp_path.glob("*.yaml")), "the file with the key is gone once it was read"
        assert (tmp_path / "log").stat().st_mode & 0o77 == 0
        with pytest.raises(EngineError, match="401"):
            SglangClient(url, vocab_size=TOKENIZER_SIZE, request_timeout_s=30, max_retries=0).check_settings(
                num_sequence_tokens=10
            )
    finally:
        launcher.kill()
        launcher.wait()
    wait_until_gone(processes, timeout_s=15)
