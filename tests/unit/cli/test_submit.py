"""The submit command around a stand-in for sbatch; with a real SLURM: tests/e2e/test_slurm.py."""

import json
from pathlib import Path

import pytest

from megatron_gkd.cli.submit import CODE_VARIABLE, CONFIG_FILE, main
from megatron_gkd.config import load_config
from tests.support.processes import ROOT
from tests.support.run_config import write_run_config

SBATCH = """#!/bin/sh
python3 -c 'import json, os, sys; print(json.dumps([os.environ["MEGATRON_GKD_CODE"], sys.argv[1:]]))' "$@" > "$0.calls"
echo "Submitted batch job 7"
"""
REFUSING_SBATCH = """#!/bin/sh
echo "Invalid account" >&2
exit 1
"""


@pytest.fixture
def job(tmp_path, monkeypatch) -> Path:
    """A job file among some code; sbatch is the stand-in."""
    code = tmp_path / "code"
    (code / "launch").mkdir(parents=True)
    (code / "launch" / "pretrain_gkd.py").write_text("entry")
    (code / "job.sbatch").write_text("#!/bin/sh\n")
    install(tmp_path, monkeypatch, SBATCH)
    monkeypatch.chdir(code)
    return code / "job.sbatch"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "sbatch").write_text(text)
    (folder / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/local/bin:/usr/bin:/bin")


def test_the_job_gets_a_copy_of_the_code_and_the_resolved_configuration(job, tmp_path, capsys):
    config = write_run_config(tmp_path / "files")
    run = tmp_path / "files" / "run"
    assert main(["--nodes", "3", str(job), "--config", str(config), "optim.lr=0.5"]) == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    code, words = json.loads((tmp_path / "bin" / "sbatch.calls").read_text())
    assert Path(code).parent == run / "code"
    assert (Path(code) / "launch" / "pretrain_gkd.py").read_text() == "entry"
    stored = Path(code) / CONFIG_FILE
    assert words == [f"--output={run}/logs/slurm_%j.log", "--nodes", "3", str(job), "--config", str(stored)]
    assert load_config(stored) == load_config(config, ["optim.lr=0.5"])


def test_every_submission_has_a_copy_of_its_own(job, tmp_path):
    config = write_run_config(tmp_path / "files")
    assert main([str(job), "--config", str(config)]) == 0
    (job.parent / "launch" / "pretrain_gkd.py").write_text("edited")
    assert main([str(job), "--config", str(config)]) == 0
    copies = (tmp_path / "files" / "run" / "code").glob("*/launch/pretrain_gkd.py")
    assert sorted(copy.read_text() for copy in copies) == ["edited", "entry"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "{config}"], "no job file is given; name one of launch/slurm"),
        (["nowhere.sbatch", "--config", "{config}"], "the job file nowhere.sbatch does not exist"),
        (["job.sbatch", "--config", "{config}", "optim.lr=-1"], "optim.lr: should be greater than 0"),
        (
            ["job.sbatch", "--config", "{config}", "runtime.working_dir={files}"],
            "has no launch/pretrain_gkd.py",
        ),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(job, tmp_path, capsys, words, message):
    names = {"config": write_run_config(tmp_path / "files"), "files": tmp_path / "files"}
    assert main([word.format(**names) for word in words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "files" / "run").exists()
    assert not (tmp_path / "bin" / "sbatch.calls").exists()


def test_what_sbatch_says_reaches_the_user_and_no_copy_stays(job, tmp_path, capsys, monkeypatch):
    install(tmp_path, monkeypatch, REFUSING_SBATCH)
    config = write_run_config(tmp_path / "files")
    assert main([str(job), "--config", str(config)]) == 2
    assert "sbatch did not take the job: Invalid account" in capsys.readouterr().err
    assert list((tmp_path / "files" / "run" / "code").iterdir()) == []


def test_a_machine_without_slurm_is_told_where_to_submit(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(job), "--config", "x.yaml"]) == 2
    assert "sbatch is not found here; submit on a login node" in capsys.readouterr().err


def test_the_variable_of_the_job_files_is_the_one_that_is_set():
    job = ROOT / "launch" / "slurm" / "job.sh"
    assert f"${{{CODE_VARIABLE}:-" in job.read_text()
