"""How the GPU check treats a stage that fails, dies or hangs; what its stages compute: tests/e2e/test_gpu_check.py."""

import json
import math
import os
import signal
import time

import pytest

from tools import gpu_check
from tools.gpu_check import Stage, main


def good(machine, rows):
    """Passes."""
    rows.at_most("error", 1e-7, 1e-6, "relative L2")
    rows.measured("time", 1.5, "ms")


def missed(machine, rows):
    """Misses a bound."""
    rows.at_most("too large", 2.0, 1.0, "")
    rows.at_most("nan", math.nan, 1.0, "")


def raising(machine, rows):
    """Raises after a row."""
    rows.measured("before", 1.0)
    raise ValueError("no such | kernel")


def dying(machine, rows):
    """Is killed after a row."""
    rows.measured("before", 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(machine, rows):
    """Does not end."""
    rows.measured("before", 1.0)
    time.sleep(600)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run the check with these stages; (exit status, tree of the JSON file, Markdown)."""

    def check(*runs, options=()):
        stages = tuple(Stage(run.__name__, run, 0.3 if run is hanging else 60) for run in runs)
        monkeypatch.setattr(gpu_check, "STAGES", stages)
        code = main(["--smoke", "--out", str(tmp_path), *options])
        page = (tmp_path / "gpu_check.md").read_text()
        return code, json.loads((tmp_path / "gpu_check.json").read_text()), page

    return check


def test_a_missed_bound_or_nan_fails_the_check(check):
    code, tree, page = check(good, missed)
    assert code == 1
    assert (tree["passed"], tree["stages"]["good"]["state"]) == (False, "passed")
    assert tree["stages"]["missed"]["state"] == "failed"
    assert "| missed | failed |" in page
    assert "2 of 2 checks failed: too large, nan" in page


@pytest.mark.parametrize(
    ("run", "state", "message"),
    [
        (raising, "error", "ValueError: no such \\| kernel"),
        (dying, "crashed", "exit code -9"),
        (hanging, "timed out", "stopped after 0.3 s"),
    ],
)
def test_a_stage_that_breaks_keeps_its_rows_and_the_next_stage_runs(check, run, state, message):
    code, tree, page = check(run, good)
    assert code == 1
    broken = tree["stages"][run.__name__]
    assert (broken["state"], [row["check"] for row in broken["rows"]]) == (state, ["before"])
    assert f"| {message} |" in page
    assert tree["stages"]["good"]["state"] == "passed"


def test_only_the_named_stages_run(check, capsys):
    code, tree, _ = check(raising, good, options=("--stages", "good"))
    assert (code, list(tree["stages"])) == (0, ["good"])
    assert "good      passed" in capsys.readouterr().out


def test_an_unknown_stage_is_refused_with_the_names(check, capsys):
    with pytest.raises(SystemExit):
        check(good, options=("--stages", "fast"))
    assert "'good'" in capsys.readouterr().err
