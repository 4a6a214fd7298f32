"""Waiting in the shell files of launch/slurm, with stand-ins for srun and scontrol; whole jobs: tests/e2e/test_slurm.py."""

import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT

SLURM = ROOT / "launch" / "slurm"
STAND_INS = """
set -euo pipefail
run_folder=$1 code=. resolved=run.yaml
mkdir -p "$run_folder/logs"
python() { echo key; }
"""


def run_bash(folder: Path, script: str, timeout_s: float = 20.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", STAND_INS + script, "bash", str(folder)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def start_and_await(srun: str) -> str:
    """Both groups as in heterogeneous.sbatch; ``srun`` is a body that knows its group from ``$1`` and its file ``$url``."""
    return f"""
source {SLURM}/servers.sh
endpoints() {{ echo 10.0.0.$1:20000; }}
srun() {{ local url=${{5#--output=}}; url=${{url//%N/n1}}; {srun}; }}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
start_servers 1 rollout student 76
start_servers 2 teacher teacher 96
await_servers 1 rollout
await_servers 2 teacher
echo ready
"""


LIVES = 'echo http://10.0.0.1:20000 >"$url"; exec sleep 60'


@pytest.mark.parametrize(("group", "name"), [(1, "rollout"), (2, "teacher")])
def test_a_server_that_ends_while_another_lives_is_named_at_once(tmp_path, group, name):
    srun = f'if [[ $1 == --het-group={group} ]]; then exit 1; else echo >"$url"; exec sleep 60; fi'
    result = run_bash(tmp_path, start_and_await(srun))
    assert result.returncode == 1
    assert f"the {name} server of group {group} ended" in result.stderr
    assert f"{tmp_path}/logs/{name}_*.log" in result.stderr


def test_the_trainer_starts_once_all_servers_answer(tmp_path):
    result = run_bash(tmp_path, start_and_await(LIVES))
    assert (result.returncode, result.stdout) == (0, "ready\n"), result.stderr


# what job.sh does when it is sourced is for a job; its functions are taken alone
WAIT = f"""
eval "$(sed -n '/^wait_for()/,/^}}/p' {SLURM}/job.sh)"
trap 'echo signal; touch HANDLED' USR1
(while [[ ! -e HANDLED ]]; do sleep 0.1; done; exit EXIT_CODE) &
pid=$!
(sleep 0.3; kill -USR1 $$) &
exit_code=0
wait_for $pid || exit_code=$?
echo $exit_code
"""


@pytest.mark.parametrize("exit_code", [0, 3, 138])
def test_a_signal_does_not_end_the_wait_and_no_exit_code_is_waited_for_again(tmp_path, exit_code):
    """138 is what srun returns when its tasks end by USR1, and what bash returns when it is interrupted by it."""
    script = WAIT.replace("EXIT_CODE", str(exit_code)).replace("HANDLED", str(tmp_path / "handled"))
    result = run_bash(tmp_path, script)
    assert result.stdout == f"signal\n{exit_code}\n"
