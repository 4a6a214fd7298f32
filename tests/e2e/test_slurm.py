"""The shipped job files in a real SLURM, four nodes on this machine: submit, check, make room, requeue, resume, stop.

In the heterogeneous job stand-ins take the places of torchrun, the trainer and the servers: tested is what the job does
around them. Serving: test_sglang_server.py.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launching import read_metrics, read_status
from tests.support.processes import ROOT, wait_until
from tests.support.run_config import write_run_config
from tests.support.slurm_cluster import SlurmCluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ONE_GPU = "--gpus-per-node=1"
HOST = os.uname().nodename.partition(".")[
    0
]  # SLURM names files after the machine, which all nodes share here


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = why_not()
    if reason:
        warnings.warn(f"the job files of launch/slurm are NOT TESTED: {reason}", stacklevel=1)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))
    with SlurmCluster(folder, num_nodes=4) as cluster:
        python = Path(sys.executable).parent
        cluster.environment["PATH"] = f"{python}:{cluster.environment['PATH']}"
        cluster.environment["OMP_NUM_THREADS"] = "1"
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the code that a test may edit."""
    for name in ("megatron_gkd", "launch"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "code"


def submit(cluster: SlurmCluster, code: Path, job: str, words: list[str]) -> int:
    """Submit a job file as a user does; the number of the job."""
    position = next((i for i, word in enumerate(words) if word.startswith("--config")), len(words))
    command = [*words[:position], str(code / "launch" / "slurm" / job), *words[position:]]
    said = cluster.run(sys.executable, str(code / "launch" / "submit.py"), *command, cwd=code)
    return int(said.partition("Submitted batch job ")[2].split()[0])


def wait_for_job(condition: Callable[[], bool], run: Path, what: str, timeout_s: float = 180.0) -> None:
    def explain() -> str:
        logs = (f"{file.name}: {file.read_text()[-2000:]}" for file in run.glob("logs/slurm*.log"))
        return "\n".join([what, *logs])

    wait_until(condition, timeout_s, explain=explain)


def wait_for_end(cluster: SlurmCluster, job: int, run: Path) -> str:
    """The state in which the job ended."""

    def state() -> str:
        return cluster.job_state(job)["JobState"]

    wait_for_job(
        lambda: state() not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), run, "the job to end"
    )
    return state()


def test_a_job_makes_room_is_requeued_and_resumes_with_its_submitted_code(cluster, code, tmp_path):
    config = write_run_config(tmp_path, train={"train_iters": 100_000})
    run = tmp_path / "run"
    runtime = ["--config", str(ROOT / "configs" / "runtime_env.yaml")]
    job = submit(
        cluster, code, "multi_node.sbatch", ["--nodes=2", ONE_GPU, "--config", str(config), *runtime]
    )
    for file in (code / "launch" / "pretrain_gkd.py", code / "launch" / "slurm" / "job.sh", config):
        file.write_text("edited after the job was submitted")

    wait_for_job(lambda: len(read_metrics(run)) >= 2, run, "two iterations")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))  # as SLURM does before the time limit
    wait_for_job(lambda: cluster.job_state(job)["Restarts"] == "1", run, "the requeue")
    stopped = read_status(run)
    assert stopped["state"] == "stopped"
    assert stopped["reason"].endswith(f"SLURM job {job} got USR1; it is requeued and goes on")
    assert (run / "checkpoints" / f"iter_{stopped['iteration']:07d}" / "manifest.json").is_file()

    wait_for_job(lambda: cluster.job_state(job)["JobState"] == "PENDING", run, "the job to wait again")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")  # SLURM would let two minutes pass
    wait_for_job(lambda: len(read_metrics(run)) > stopped["iteration"], run, "an iteration after the resume")
    (run / "stop").write_text("seen enough")
    assert wait_for_end(cluster, job, run) == "COMPLETED"
    status = read_status(run)
    assert (status["state"], status["reason"]) == ("stopped", f"stopped by {run}/stop: seen enough")
    iterations = [line["iteration"] for line in read_metrics(run)]
    assert iterations == list(range(1, status["iteration"] + 1))
    check_logs(run, job, stopped["iteration"])


def check_logs(run: Path, job: int, resumed_at: int) -> None:
    rank_log = (run / "logs" / f"{os.uname().nodename}_rank_0.log").read_text()
    assert f"iter_{resumed_at:07d}, iteration {resumed_at}" in rank_log
    assert "Environment: NCCL_DEBUG=WARN" in rank_log
    assert "OMP_NUM_THREADS=1 was set" not in rank_log
    assert (run / "logs" / f"{os.uname().nodename}_rank_1.log").is_file()
    assert (run / "logs" / f"slurm_{job}_{HOST}.log").is_file()
    for node in ("n1", "n2"):
        assert len(list((run / "logs" / f"torchrun_{node}").glob("*/attempt_0/0/stderr.log"))) == 2
    own = (run / "logs" / f"slurm_{job}.log").read_text()
    assert f"the run in {run}: stopped" in own
    assert "warning" not in own


def test_a_configuration_that_does_not_fit_the_nodes_is_refused_before_any_rank(cluster, code, tmp_path):
    config, run = write_run_config(tmp_path), tmp_path / "run"  # for two ranks
    job = submit(cluster, code, "one_node.sbatch", [ONE_GPU, "--config", str(config)])
    assert wait_for_end(cluster, job, run) == "FAILED"
    assert "does not divide the 1 ranks of the job" in (run / "logs" / f"slurm_{job}.log").read_text()
    assert not list(run.glob("logs/torchrun*"))
    assert not (run / "status.json").exists()


SERVER = """
import json, os, signal, sys, threading
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
words["key"], words["gpus"] = os.environ["MEGATRON_GKD_SGLANG_KEY"], os.environ["SLURM_GPUS_ON_NODE"]
Path(words["--log-file"] + ".json").write_text(json.dumps(words))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path(words["--log-file"]).write_text("stopped") * 0))
print(f"http://{words['--host']}:{words['--port']}", flush=True)
threading.Event().wait()
"""
TORCHRUN = """
import os, sys
script = next(i for i, word in enumerate(sys.argv) if word.endswith("pretrain_gkd.py"))
os.environ["RANK"] = os.environ["SLURM_NODEID"]
os.execv(sys.executable, [sys.executable, *sys.argv[script:]])
"""
TRAINER = """
import argparse, json, os, sys
from pathlib import Path
from megatron_gkd.cli import pretrain
if "RANK" not in os.environ:
    sys.exit(pretrain.main())
if os.environ["RANK"] == "0":
    parser = argparse.ArgumentParser()
    pretrain.add_config_arguments(parser)
    options = parser.parse_args()
    config = pretrain.load_config(options.config, options.overrides)
    rollout, run = config.rollout, config.train.output_dir
    key = os.environ[rollout.api_key_env]
    servers = sorted(file.name for file in run.glob("logs/*.url") if file.read_text())
    teacher = config.teacher.url, os.environ[config.teacher.api_key_env]
    written = {"urls": rollout.urls, "key": key, "push": str(rollout.push_dir), "servers": servers, "teacher": teacher}
    (run / "trainer.json").write_text(json.dumps(written))
    (run / "status.json").write_text('{"state": "done", "iteration": 1, "reason": ""}')
"""


def test_the_trainer_of_a_heterogeneous_job_finds_the_servers_of_the_other_groups(cluster, code, tmp_path):
    config, run = write_run_config(tmp_path), tmp_path / "run"
    for file, text in (
        ("launch/serve.py", SERVER),
        ("launch/pretrain_gkd.py", TRAINER),
        ("torch/distributed/run.py", TORCHRUN),
    ):
        (code / file).parent.mkdir(parents=True, exist_ok=True)
        (code / file).write_text(text)
    job_file = code / "launch" / "slurm" / "heterogeneous.sbatch"
    job_file.write_text(job_file.read_text().replace("--gpus-per-node=8", ONE_GPU))
    served = f"teacher={{kind: server, hf: {tmp_path / 'teacher'}}}"
    keys = served, "loss.support=teacher_top_k", "data.max_teacher_prompt_length=84"
    job = submit(cluster, code, job_file.name, ["--config", str(config), *keys])
    assert wait_for_end(cluster, job, run) == "COMPLETED"
    trainer = json.loads((run / "trainer.json").read_text())
    servers = {
        name: json.loads((run / "logs" / f"{name}_{node}.log.json").read_text())
        for name, node in (("rollout", "n3"), ("teacher", "n4"))
    }
    engine, teacher = servers["rollout"], servers["teacher"]
    assert trainer["urls"] == [f"http://{engine['--host']}:{engine['--port']}"]
    assert trainer["teacher"] == [f"http://{teacher['--host']}:{teacher['--port']}", engine["key"]]
    assert engine["--port"] != teacher["--port"]
    assert trainer["key"] == engine["key"] == teacher["key"] != ""
    assert trainer["push"] == str(run / "push")
    urls = [f"rollout_{HOST}.url", f"teacher_{HOST}.url"]
    assert trainer["servers"] == urls, "the trainer did not wait for them"
    assert engine["--model"] == str(tmp_path / "student")
    assert teacher["--model"] == str(tmp_path / "teacher")
    assert engine["--context-length"] == "76"
    assert teacher["--context-length"] == "96"
    assert engine["--tp"] == engine["gpus"] == "1"
    for name, node in (("rollout", "n3"), ("teacher", "n4")):
        assert (run / "logs" / f"{name}_{node}.log").read_text() == "stopped"
