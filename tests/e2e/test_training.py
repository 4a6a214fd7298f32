"""The training command on two CPU ranks: records, resume, stop, refusal, and a server that dies.

Models are tiny and random; what the command does to a real model is shown by `make quickstart`. Exactness of layouts is in
tests/distributed.
"""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.support.launching import launch, read_metrics, read_status, run_torchrun, train, wait_for_run
from tests.support.processes import run_python, running
from tests.support.run_config import write_run_config
from tests.support.tiny_models import write_prompts

NUM_ITERATIONS = 12
IN_BACKGROUND = ("checkpoint.async_save=true", "checkpoint.save_interval=1")
VALUES = ("loss", "loss/on_policy", "loss/off_policy", "grad_norm", "lr", "tokens", "tokens/consumed")


def export(checkpoint: Path, out: Path) -> dict:
    result = run_python("tools/convert_megatron_to_hf.py", "--checkpoint", checkpoint, "--out", out)
    assert result.returncode == 0, result.stderr
    return load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    more = str(write_prompts(tmp_path / "more.jsonl", 5))
    config = write_run_config(
        tmp_path,
        data={
            "prompts": [str(tmp_path / "prompts.jsonl"), more],
            "weights": [2, 1],
            "streaming": True,
            "shuffle_rows": 3,
        },
        evaluation={"files": more, "interval": 5},
        train={"train_iters": NUM_ITERATIONS},
    )
    whole, parts = tmp_path / "run", tmp_path / "parts"
    output = train(config)
    assert read_status(whole) == {
        "state": "done",
        "iteration": NUM_ITERATIONS,
        "reason": "all iterations are done",
    }
    assert f"iteration {NUM_ITERATIONS}/{NUM_ITERATIONS} | loss " in output

    # torchrun hands the signal to the ranks and all their children; these runs save in the background
    first = stop_a_run(config, parts, lambda process: process.send_signal(signal.SIGTERM))
    assert "SIGTERM" in first["reason"]
    (parts / "stop").write_text("meant for an earlier start")
    second = stop_a_run(config, parts, lambda _: (parts / "stop").write_text("enough for today\n"))
    assert second["reason"] == f"stopped by {parts}/stop: enough for today"
    assert 1 <= first["iteration"] < second["iteration"] < NUM_ITERATIONS
    damaged = parts / "checkpoints" / "iter_0000099"
    shutil.copytree(parts / "checkpoints" / f"iter_{second['iteration']:07d}", damaged)
    (damaged / "manifest.json").write_text("{")
    output = train(config, f"train.output_dir={parts}", *IN_BACKGROUND)
    assert f"Resuming from {parts}" in output
    assert "Skipping checkpoint iter_0000099" in output
    assert not damaged.exists(), "or the next resume and retention would take it for the newest"
    assert (parts / "checkpoints" / "superseded" / "iter_0000099").is_dir()
    assert f"iter_{NUM_ITERATIONS:07d} in the background" in output
    assert not (parts / "stop").exists()
    for expected, got in zip(read_metrics(whole), read_metrics(parts), strict=True):
        assert {key: got[key] for key in VALUES} == {key: expected[key] for key in VALUES}
        assert got.get("validation/loss") == expected.get("validation/loss")
        is_due = got["iteration"] in (5, 10, NUM_ITERATIONS)
        assert ("validation/loss" in got) == is_due, "after every fifth and after the last"
    expected = export(whole / "checkpoints" / f"iter_{NUM_ITERATIONS:07d}", tmp_path / "whole_hf")
    got = export(parts / "checkpoints" / f"iter_{NUM_ITERATIONS:07d}", tmp_path / "parts_hf")
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    check_exported(tmp_path / "whole_hf", tmp_path / "student")


def stop_a_run(config: Path, run: Path, ask: Callable[[subprocess.Popen], object]) -> dict:
    """Start the run, ask it to stop after a new iteration and a first checkpoint; its status after the end."""
    log_file, num_before = run.with_suffix(".log"), len(read_metrics(run))
    process = launch(config, f"train.output_dir={run}", *IN_BACKGROUND, log_file=log_file)

    def is_due() -> bool:
        return len(read_metrics(run)) > num_before and any(run.glob("checkpoints/iter_???????"))

    wait_for_run(is_due, process, log_file, 200)
    ask(process)
    process.wait(60)  # torchrun itself fails when it was signalled
    status = read_status(run)
    assert status["state"] == "stopped"
    return status


def check_exported(folder: Path, student: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(student).get_vocab()
    )
    before = load_file(student / "model.safetensors")
    assert all(
        not before[name].equal(tensor) for name, tensor in load_file(folder / "model.safetensors").items()
    )
    assert model.num_parameters() == sum(tensor.numel() for tensor in before.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sglang_generates_every_iteration_and_its_death_ends_the_run_in_order(tmp_path):
    config = write_run_config(
        tmp_path,
        rollout={"kind": "sglang", "start_timeout_s": 240, "num_threads": 1},
        runtime={"env_vars": {"OF_RUN": "{process}"}},
    )
    run, log_file = tmp_path / "run", tmp_path / "config.log"
    process = launch(config, "train.train_iters=1000", log_file=log_file)
    wait_for_run(lambda: len(read_metrics(run)) >= 3, process, log_file, 400)
    check_records(run)
    assert [server.environ()["OF_RUN"] for server in servers_of(process)] == ["sglang"]
    assert "Environment: OF_RUN=rank_1" in (run / "logs" / "rank_1.log").read_text()
    killed = kill_server(process)
    assert killed, "no server process was found"
    start = time.monotonic()
    assert process.wait(60) != 0
    seconds = time.monotonic() - start
    status = read_status(run)
    assert status["state"] == "failed"
    assert "SGLang server" in status["reason"], status
    assert "sglang.log" in status["reason"], "the message does not say where the log is"
    assert seconds < 60
    assert not running(killed)
    iteration = status["iteration"]
    assert (run / "checkpoints" / f"iter_{iteration:07d}" / "manifest.json").is_file()
    changes = [
        "rollout={kind: megatron}",
        "optim.lr=1e-3",
        "gkd.lmbda=1",
        f"train.train_iters={iteration + 1}",
    ]
    refused = run_torchrun(config, *changes)
    assert "optim.lr (was 0.003, is 0.001)" in refused.stderr
    allowed = "checkpoint.allow_changes=[rollout.kind,gkd.lmbda,optim.lr]"
    assert allowed in refused.stderr
    output = train(config, *changes, allowed)
    assert f"iteration {iteration}" in output
    assert "Changed since the checkpoint: gkd.lmbda (was 0.5, is 1.0)" in output
    assert read_metrics(run)[-1]["rollout/on_policy_share"] == 1
    assert read_metrics(run)[-1]["lr"] <= 1e-3 < read_metrics(run)[-2]["lr"]
    assert [line["iteration"] for line in read_metrics(run)] == list(range(1, iteration + 2))


def check_records(run: Path) -> None:
    for line in read_metrics(run):
        assert line["lag"] == 0
        assert line["push/probe_difference"] < 2e-4
        assert line["rollout/on_policy_share"] == 0.5
        assert {
            "time/rollout_s",
            "time/teacher_s",
            "time/student_s",
            "time/push_s",
            "memory/peak_gib",
        } <= line.keys()
    schema = json.loads((run / "metrics_schema.json").read_text())
    assert read_metrics(run)[0].keys() - {"iteration"} == schema.keys()
    assert all(entry["unit"] and entry["reduce"] for entry in schema.values())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "is_on_policy", "weight_version", "finish_reason"} <= samples[0].keys()
    written = [sample for sample in samples if sample["is_on_policy"]]
    assert all(sample["weight_version"] == sample["iteration"] - 1 for sample in written)
    assert list((run / "tensorboard").iterdir())
    assert (run / "config.yaml").is_file()


def servers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """SGLang's main processes below ``process``, not the one that guards them."""
    return [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "sglang.launch_server" in p.cmdline() and "guard.py" not in " ".join(p.cmdline())
    ]


def kill_server(process: subprocess.Popen) -> list[psutil.Process]:
    """kill -9 them."""
    servers = servers_of(process)
    for server in servers:
        server.kill()
    return servers


def test_a_mistake_is_refused_before_any_rank_talks_to_another(tmp_path):
    config = write_run_config(tmp_path)
    command = "launch/pretrain_gkd.py", "--config", config, "--check"
    result = run_python(*command, "train.train_iters=ten", "los.beta=0.5")
    assert result.returncode == 2
    assert "train.train_iters" in result.stderr
    assert "did you mean 'loss'" in result.stderr
    result = run_python(*command, "--world-size", "3")
    assert result.returncode == 2
    assert "tensor_model_parallel_size=2" in result.stderr
    result = run_python(*command, "--world-size", "2")
    assert (result.returncode, result.stderr) == (0, "")


CHECK_WITHOUT_TORCH = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "megatron", "sglang", "transformers"}:
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_check_needs_no_torch(tmp_path):
    config = write_run_config(tmp_path)
    command = "launch/pretrain_gkd.py", "--config", config, "--check", "--world-size", "2"
    result = run_python("-c", CHECK_WITHOUT_TORCH, *command)
    assert result.returncode == 0, result.stderr
    assert "fine for 2 ranks" in result.stdout


def test_unusable_prompts_are_refused_with_their_line_and_noted_in_the_status(tmp_path):
    config = write_run_config(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": 7}\n')
    result = run_torchrun(config)
    assert result.returncode != 0
    assert "refused: " in result.stderr
    assert "prompts.jsonl:21" in result.stderr
    status = read_status(tmp_path / "run")
    assert status["state"] == "refused"
    assert "prompts.jsonl:21" in status["reason"]


def test_a_dry_run_shows_memory_and_times_and_writes_nothing(tmp_path):
    config = write_run_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = run_torchrun(config, "--dry-run")
    assert result.returncode == 0, result.stderr[-5000:]
    assert "8 samples of 76 tokens = 608 tokens per iteration" in result.stdout
    for words in ("teacher", "student", "rank 0: peak memory", "rank 1: peak memory"):
        assert words in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
