"""Which variables a process sets. When it sets them: tests/unit/cli/test_pretrain.py."""

import logging
import os
from pathlib import Path

from megatron_gkd.platform.environment import Environment, Placeholders
from tests.support.processes import run_python


def test_placeholders_name_the_run_the_machine_and_the_process(tmp_path):
    place = Placeholders(tmp_path, "rank_3", host="node7")
    assert place.fill("{output_dir}/a_{host}_{process}.log %h {}") == f"{tmp_path}/a_node7_rank_3.log %h {{}}"


def test_a_relative_run_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Placeholders(Path("runs/a"), "sglang").fill("{output_dir}") == f"{tmp_path}/runs/a"


def test_a_variable_of_the_user_wins_and_the_log_says_so(tmp_path, caplog):
    wanted = {"A": "1", "B": "2", "C": "3", "D": None}
    environment = Environment.of(
        wanted, Placeholders(tmp_path, "rank_0"), given={"B": "7", "C": "3", "D": "4"}
    )
    assert environment.values == {"A": "1"}
    with caplog.at_level(logging.INFO):
        environment.report()
    assert "Environment: A=1" in caplog.text
    assert "B=7 was set outside and wins over runtime.env_vars.B=2" in caplog.text
    assert "C=3" not in caplog.text
    assert "D" not in environment.kept


def test_folders_of_files_exist_before_a_library_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    wanted = {"A_FILE": "{output_dir}/dumps/{host}", "B_FILE": "/nowhere/else/b"}
    environment = Environment.of(wanted, Placeholders(tmp_path / "run", "rank_0"), given={})
    environment.apply()
    assert not (tmp_path / "run").exists()
    environment.make_folders()
    assert os.environ["A_FILE"].startswith(str(tmp_path / "run" / "dumps"))
    assert [folder.name for folder in (tmp_path / "run").iterdir()] == ["dumps"]


LIKE_TORCHRUN = """
import os, subprocess, sys
os.environ.update(TORCHELASTIC_RUN_ID="1", OMP_NUM_THREADS="1")
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
WORKER = """
from megatron_gkd.platform.environment import variables_of_user
given = variables_of_user()
print(given.get("OMP_NUM_THREADS"), given.get("OF_USER"), "torch" in __import__("sys").modules)
"""


def test_what_torchrun_adds_is_not_the_users():
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"OF_USER": "x"}
    for given, expected in (({}, "None x False"), ({"OMP_NUM_THREADS": "2"}, "2 x False")):
        result = run_python("-c", LIKE_TORCHRUN, WORKER, env=environment | given, check=True)
        assert result.stdout.strip() == expected
