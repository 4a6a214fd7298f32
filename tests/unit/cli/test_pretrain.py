"""What the training command does before torch is imported. A whole run: tests/e2e/test_training.py."""

import os
import socket
from pathlib import Path

import pytest

from megatron_gkd.cli import pretrain
from megatron_gkd.cli.pretrain import main
from megatron_gkd.config import load_config
from megatron_gkd.observability import Status, StatusFile
from megatron_gkd.observability.run_folder import RunLock
from tests.support.processes import run_python
from tests.support.run_config import write_run_config

SHOW_ENVIRONMENT_AT_IMPORT_OF_TORCH = """
import os, runpy, sys

class Show:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("A_FILE"), os.environ.get("OF_USER"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Show())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_environment_is_set_before_torch_is_imported(tmp_path):
    env_vars = {"A_FILE": "{output_dir}/dumps/{process}", "OF_USER": "config"}
    config = write_run_config(tmp_path, runtime={"env_vars": env_vars})
    command = "launch/pretrain_gkd.py", "--config", config
    environment = {**os.environ, "OF_USER": "shell", "WORLD_SIZE": "2"}
    result = run_python("-c", SHOW_ENVIRONMENT_AT_IMPORT_OF_TORCH, *command, env=environment)
    assert result.stdout == f"{tmp_path}/run/dumps/rank_0 shell\n", result.stderr
    assert (tmp_path / "run" / "dumps").is_dir()


def test_a_second_launch_in_a_folder_leaves_the_first_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, run = write_run_config(tmp_path), tmp_path / "run"
    first = RunLock(run)
    first.acquire()
    (run / "stop").write_text("meant for the first")
    assert main(["--config", str(config)]) == 2
    assert (
        f"refused: train.output_dir={str(run)!r} is in use by process {os.getpid()}"
        in capsys.readouterr().err
    )
    assert sorted(file.name for file in run.iterdir()) == ["run.lock", "stop"]


@pytest.mark.parametrize(
    ("first", "second", "noted"),
    [
        (1, 0, "rank 1 on {host}: out of memory"),  # rank 0 then only sees that a connection was lost
        (0, 1, "out of memory"),
    ],
)
def test_the_first_rank_that_fails_says_why(tmp_path, monkeypatch, first, second, noted):
    monkeypatch.setattr(pretrain, "RANK_0_FIRST_S", 0.0)
    config = load_config(write_run_config(tmp_path))
    status = StatusFile(config.train.output_dir)
    status.write("stopped", 3, "an earlier start")
    RunLock(config.train.output_dir).acquire()
    pretrain._note_start(config)
    assert status.read() == Status("running", 3, "starting")
    for rank, reason in ((first, "out of memory"), (second, "connection closed")):
        monkeypatch.setenv("RANK", str(rank))
        pretrain._note_end(config, "failed", 4, reason)
    assert status.read() == Status("failed", 4, noted.format(host=socket.gethostname()))


def test_a_rank_of_a_launch_without_the_folder_tells_the_terminal_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "RANK_0_FIRST_S", 0.0)
    config = load_config(write_run_config(tmp_path))
    RunLock(config.train.output_dir).acquire()
    pretrain._note_start(config)
    monkeypatch.setenv("MASTER_PORT", "29512")
    monkeypatch.setenv("RANK", "1")
    assert pretrain._refuse("no such file", config) == 2
    assert capsys.readouterr().err == f"refused: rank 1 on {socket.gethostname()}: no such file\n"
    assert StatusFile(config.train.output_dir).read() == Status("running", 0, "starting")


def test_a_damaged_status_file_does_not_keep_a_run_from_starting(tmp_path):
    config = load_config(write_run_config(tmp_path))
    config.train.output_dir.mkdir()
    (config.train.output_dir / "status.json").write_text("{")
    pretrain._note_start(config)
    assert StatusFile(config.train.output_dir).read() == Status("running", 0, "starting")


def test_a_configuration_that_one_node_cannot_read_is_refused_by_its_first_rank(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RANK", "3")
    for local_rank, expected in (("1", ""), ("0", f"refused: rank 3 on {socket.gethostname()}: ")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["--config", str(tmp_path / "missing.yaml")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(expected)
        assert bool(err) == bool(expected)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.output_dir", "{run}"),
        ("seq_length", "76"),
        ("student.hf_folder", "{run}/../student"),
        ("rollout.stop", "()"),
    ],
)
def test_scripts_can_ask_for_a_value_of_the_configuration(tmp_path, capsys, key, expected):
    config = write_run_config(tmp_path)
    assert main(["--config", str(config), "--show", key]) == 0
    shown = capsys.readouterr().out.removesuffix("\n")
    assert Path(shown).resolve() == Path(expected.format(run=tmp_path / "run")).resolve()


def test_scripts_can_ask_for_the_whole_configuration(tmp_path, capsys):
    config = write_run_config(tmp_path)
    assert main(["--config", str(config), "loss.beta=0.25", "--show"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "shown.yaml") == load_config(config, ["loss.beta=0.25"])


@pytest.mark.parametrize("key", ["train.outputdir", "train", "to_yaml", "loss.beta.x"])
def test_a_key_that_cannot_be_shown_is_refused(tmp_path, capsys, key):
    assert main(["--config", str(write_run_config(tmp_path)), "--show", key]) == 2
    assert f"--show {key}: " in capsys.readouterr().err
