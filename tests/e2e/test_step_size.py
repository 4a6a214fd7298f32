"""One iteration stays readable: it enters a bounded number of the package's files and functions."""

import json

import pytest

from tests.support.processes import run_python

BOUNDS = {"iteration": {"files": 38, "functions": 180}, "loss": {"files": 9, "functions": 45}}


@pytest.mark.slow
def test_an_iteration_and_a_loss_enter_few_files_and_functions(tmp_path):
    result = run_python("tools/count_step.py", "--json", tmp_path / "counts.json")
    assert result.returncode == 0, result.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    for name, bounds in BOUNDS.items():
        assert all(0 < counts[name][kind] <= bound for kind, bound in bounds.items()), counts
