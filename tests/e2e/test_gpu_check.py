"""`tools/gpu_check.py --smoke`: every stage of the GPU check, small, on the CPU.

What a stage does on a GPU is seen on a GPU only; how the check treats a stage that fails is in
tests/unit/test_gpu_check.py.
"""

import json

import pytest

from tests.support.processes import run_python

STAGES = ["env", "products", "dense", "certify", "train", "linear", "kernels", "gemm", "tests"]
DIVERGENCES = 8


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(gpu_check.json, gpu_check.md) of a smoke run."""
    out = tmp_path_factory.mktemp("gpu_check")
    result = run_python("tools/gpu_check.py", "--smoke", "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((out / "gpu_check.json").read_text()), (out / "gpu_check.md").read_text()


def rows_of(smoke, stage: str) -> dict[str, dict]:
    return {row["check"]: row for row in smoke[0]["stages"][stage]["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_stage_passes_and_is_in_both_files(smoke):
    tree, page = smoke
    assert {name: stage["state"] for name, stage in tree["stages"].items()} == dict.fromkeys(STAGES, "passed")
    assert tree["smoke"]
    assert tree["passed"]
    assert page.startswith("# Smoke run on a CPU: nothing here is a measurement of a GPU\n")
    for name, stage in tree["stages"].items():
        assert f"| {name} | passed |" in page
        assert f"## {name}\n\n{stage['proves'].splitlines()[0]}" in page


@pytest.mark.timeout(400)
def test_the_environment_names_versions_and_device(smoke):
    rows = rows_of(smoke, "env")
    assert rows["device"]["value"] == "cpu"
    assert rows["megatron-core"]["passed"]
    assert rows["bandwidth of a copy"]["value"] > 0


@pytest.mark.timeout(400)
def test_the_comparisons_with_float64_have_bounds_and_keep_them(smoke):
    for stage, number in (("products", 2 * 5), ("dense", 2 * 2 * DIVERGENCES * 3), ("certify", 2)):
        bounded = [row for row in rows_of(smoke, stage).values() if row["bound"] is not None]
        assert len(bounded) == number, stage
        assert all(row["passed"] and row["value"] <= row["bound"] for row in bounded)
    assert rows_of(smoke, "certify")["losses"]["value"] > 10


@pytest.mark.timeout(400)
def test_the_training_command_ran_and_resumed(smoke):
    rows = rows_of(smoke, "train")
    assert rows["start"]["value"] == "done at iteration 1"
    assert rows["resume"]["value"] == "done at iteration 2"
    assert len(rows["losses"]["value"].split()) == 2


@pytest.mark.timeout(400)
def test_the_measuring_stages_give_a_number_for_every_case(smoke):
    for stage, unit, number in (("gemm", "TFLOP/s", 2 * 3 * 3), ("linear", "ms", 5 * 2 + 3)):
        rates = [row for row in rows_of(smoke, stage).values() if row["unit"] == unit]
        assert len(rates) == number
        assert all(row["value"] > 0 for row in rates)
    copies = [row for name, row in rows_of(smoke, "kernels").items() if name.startswith("copy")]
    assert [row["value"] for row in copies if row["unit"] != "GB/s"] == [1.0] * 6


@pytest.mark.timeout(400)
def test_the_gpu_tests_were_collected_and_skipped(smoke):
    summary = rows_of(smoke, "tests")["pytest tests/gpu"]["value"]
    assert "skipped" in summary
    assert "failed" not in summary
