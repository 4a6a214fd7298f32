"""Collecting metrics on one rank and writing them; the reduction over ranks is covered in tests/distributed."""

import json
import math
import sys

import pytest
import torch

from megatron_gkd.observability.metrics import Metric, Metrics, MetricsWriter, SampleWriter
from tests.support.processes import run_python


@pytest.mark.parametrize(
    ("reduce", "expected"), [("sum", 6.5), ("max", 4.0), ("mean", 6.5 / 3), ("rank0", 0.5)]
)
def test_values_of_one_name_are_put_together_by_the_metrics_own_rule(reduce, expected):
    metrics = Metrics()
    for value in (2, torch.tensor(4.0, dtype=torch.bfloat16), 0.5):
        metrics.add("m", value, unit="1", reduce=reduce)
    assert metrics.take() == [Metric("m", pytest.approx(expected, abs=1e-15), "1", reduce)]


def test_take_starts_anew_and_keeps_the_order_of_appearance():
    metrics = Metrics()
    metrics.add("b", 1, unit="1", reduce="sum")
    metrics.add("a", torch.tensor(3), unit="tokens", reduce="sum")
    assert [(m.name, m.value) for m in metrics.take()] == [("b", 1.0), ("a", 3.0)]
    assert metrics.take() == []


def test_tensor_is_copied_and_detached_when_added():
    metrics, value = Metrics(), torch.tensor(1.0, requires_grad=True)
    metrics.add("m", value, unit="1", reduce="sum")
    with torch.no_grad():
        value.fill_(7)
    assert metrics.take()[0].value == 1.0


def test_float64_and_large_counts_keep_their_digits():
    metrics = Metrics()
    metrics.add("loss", torch.tensor(1 / 3, dtype=torch.float64), unit="nats", reduce="sum")
    metrics.add("tokens", torch.tensor(2**40 + 1), unit="tokens", reduce="sum")
    assert [m.value for m in metrics.take()] == [1 / 3, 2**40 + 1]


@pytest.mark.parametrize("values", [(1.0, math.nan), (math.nan, 1.0)])
@pytest.mark.parametrize("reduce", ["sum", "max", "mean"])
def test_nan_is_never_lost(values, reduce):
    metrics = Metrics()
    for value in values:
        metrics.add("m", value, unit="1", reduce=reduce)
    assert math.isnan(metrics.take()[0].value)


def test_metric_without_unit_or_known_reduction_is_refused():
    with pytest.raises(ValueError, match="needs a unit and a reduction"):
        Metrics().add("m", 1, unit="", reduce="sum")
    with pytest.raises(ValueError, match="needs a unit and a reduction"):
        Metrics().add("m", 1, unit="s", reduce="median")


def test_one_name_has_one_unit_and_one_reduction_also_after_take():
    metrics = Metrics()
    metrics.add("m", 1, unit="s", reduce="sum")
    metrics.take()
    with pytest.raises(ValueError, match=r"\('s', 'sum'\), not \('s', 'max'\)"):
        metrics.add("m", 1, unit="s", reduce="max")


def test_vector_is_refused():
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        Metrics().add("m", torch.zeros(2), unit="s", reduce="sum")


LOSS = [Metric("loss", 0.0, "nats/token", "sum")]


def read_lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_each_iteration_is_one_line_that_can_be_read_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.declare(LOSS)
    for iteration in (1, 2):
        writer.write(iteration, {"loss": 1.5 / iteration})
        assert read_lines(tmp_path / "metrics.jsonl")[-1] == {"iteration": iteration, "loss": 1.5 / iteration}
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_non_finite_values_stay_valid_json_and_are_named(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.declare([Metric(name, 0.0, "1", "sum") for name in "abcd"])
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {
            "iteration": 1,
            "a": None,
            "b": None,
            "c": None,
            "d": 1.0,
            "non_finite": {"a": "nan", "b": "inf", "c": "-inf"},
        }
    ]


def test_schema_states_unit_and_reduction_and_grows(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.declare(LOSS)
    MetricsWriter(tmp_path, tensorboard=False).declare([Metric("lr", 0.0, "1", "rank0")])  # a resumed run
    assert json.loads((tmp_path / "metrics_schema.json").read_text()) == {
        "loss": {"unit": "nats/token", "reduce": "sum"},
        "lr": {"unit": "1", "reduce": "rank0"},
    }
    with pytest.raises(ValueError, match="'loss' was declared as"):
        writer.declare([Metric("loss", 0.0, "bits", "sum")])


def test_undeclared_metric_is_refused_before_anything_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"\['loss'\] have no unit and reduction"):
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_resumed_run_has_each_iteration_once_and_loses_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first, last in ((1, 5), (4, 6)):  # the second attempt resumes behind iteration 3
        writer = MetricsWriter(tmp_path, tensorboard=False)
        writer.truncate_after(first - 1)
        writer.declare(LOSS)
        for iteration in range(first, last + 1):
            writer.write(iteration, {"loss": float(first)})
        writer.close()
    assert [(line["iteration"], line["loss"]) for line in read_lines(path)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 4.0), (5, 4.0), (6, 4.0),
    ]  # fmt: skip
    superseded = read_lines(tmp_path / "metrics.superseded.jsonl")
    assert [(line["iteration"], line["loss"]) for line in superseded] == [(4, 1.0), (5, 1.0)]


@pytest.mark.parametrize("tail", ['{"iteration": 2, "lo', '{"iteration": 2}', "\\u00e9"])
def test_line_torn_by_a_kill_moves_aside(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 1.0}\n' + tail)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.truncate_after(7)
    assert read_lines(path) == [{"iteration": 1, "loss": 1.0}]
    assert read_lines(tmp_path / "metrics.superseded.jsonl") == [{"torn": tail}]


def test_truncating_a_clean_file_or_none_changes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.truncate_after(0)
    assert list(tmp_path.iterdir()) == []
    writer.declare(LOSS)
    writer.write(1, {"loss": 1.0})
    writer.truncate_after(1)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_tensorboard_gets_the_scalars_and_hides_superseded_ones(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 3), (2, 4)):
        writer = MetricsWriter(tmp_path, tensorboard=True)
        writer.declare(LOSS)
        for iteration in range(first, last + 1):
            writer.write(iteration, {"loss": 10.0 * first + iteration})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 11.0), (2, 22.0), (3, 23.0), (4, 24.0)]


def test_missing_tensorboard_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"logging\.tensorboard needs the package tensorboard"):
        MetricsWriter(tmp_path, tensorboard=True)


def test_samples_are_written_as_readable_text_whatever_the_model_says(tmp_path):
    writer = SampleWriter(tmp_path)
    texts = ["Gr\u00fc\u00dfe \u4f60\u597d", "line\nbreak \u2028 \r", "half \ud83d"]
    for iteration, text in enumerate(texts, start=1):
        writer.write(
            iteration,
            file=0,
            row=4,
            prompt="p",
            completion=text,
            finish_reason="stop",
            is_on_policy=True,
            weight_version=2,
        )
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").open(encoding="utf-8")]
    assert [line["completion"] for line in lines] == texts
    assert "\u4f60\u597d" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert lines[0].keys() == {
        "iteration", "file", "row", "prompt", "completion", "finish_reason", "is_on_policy", "weight_version",
    }  # fmt: skip
    writer.truncate_after(1)
    assert len(read_lines(tmp_path / "samples.jsonl")) == 1
    assert [
        json.loads(line)["completion"] for line in (tmp_path / "samples.superseded.jsonl").open()
    ] == texts[1:]


def test_package_loads_and_collects_numbers_without_torch():
    code = (
        "import sys; from megatron_gkd.observability import Metrics\n"
        "m = Metrics(); m.add('a', 1, unit='s', reduce='sum'); assert m.take()[0].value == 1\n"
        "assert 'torch' not in sys.modules"
    )
    run_python("-c", code, check=True)
