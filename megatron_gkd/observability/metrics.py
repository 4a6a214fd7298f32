"""Metrics of an iteration: collected on every rank, reduced, and written by one rank.

``metrics.jsonl`` has one JSON object per iteration. JSON has no NaN or infinity: such a value is written as null, and the
key ``non_finite`` maps its name to "nan", "inf" or "-inf". ``metrics_schema.json`` has the unit and the reduction of every
metric. TensorBoard gets the same scalars.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_gkd.observability.files import JsonLines, replace_text

if TYPE_CHECKING:
    from torch import Tensor

Reduce = Literal["rank0", "sum", "max", "mean"]
"""Reduction over ranks; ``rank0`` takes rank 0's value, for values equal on all ranks or known to rank 0 only."""


@dataclass(frozen=True)
class Metric:
    """A value with its unit and its reduction over ranks."""

    name: str
    value: float
    unit: str
    reduce: Reduce


class Metrics:
    """Collects one rank's metrics between two calls of ``take``.

    Several values of one name are combined by the metric's own reduction; ``rank0`` keeps the last.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = {}
        self._rules: dict[str, tuple[str, Reduce]] = {}

    def add(self, name: str, value: float | Tensor, *, unit: str, reduce: Reduce) -> None:
        """Add a value; a tensor is read, and its device synchronized, only in ``take``.

        Args:
            name: For example ``loss`` or ``rollout/completion_length``.
            value: Number or 0-d tensor of any dtype. A tensor is copied, so that in-place changes do not matter.
            unit: For example ``nats/token``, ``s``, ``tokens``, or ``1`` for a plain number.
            reduce: Reduction over values, and later over ranks.

        Raises:
            ValueError: Unknown reduction, no unit, not a scalar, or the name has another unit or reduction.
        """
        # checked here instead of at the reduction, so that the error names the line that adds the metric
        if reduce not in get_args(Reduce) or not unit:
            raise ValueError(
                f"metric {name!r} needs a unit and a reduction of {get_args(Reduce)}, got {unit!r}, {reduce!r}"
            )
        if self._rules.setdefault(name, (unit, reduce)) != (unit, reduce):
            raise ValueError(f"metric {name!r} has (unit, reduce) {self._rules[name]}, not {(unit, reduce)}")
        if not isinstance(value, int | float):
            if value.ndim != 0:
                raise ValueError(f"metric {name!r} must be a scalar, got shape {tuple(value.shape)}")
            value = value.detach().clone()  # Megatron's schedules divide a returned loss in place
        self._values.setdefault(name, []).append(value)

    def take(self) -> list[Metric]:
        """Return the metrics since the last call in order of first appearance, and reset."""
        names = list(self._values)
        floats = iter(_to_floats([value for name in names for value in self._values[name]]))
        metrics = []
        for name in names:
            unit, reduce = self._rules[name]
            values = [next(floats) for _ in self._values[name]]
            metrics.append(Metric(name, _combine(values, reduce), unit, reduce))
        self._values = {}
        return metrics


def _to_floats(values: list[float | Tensor]) -> list[float]:
    """Convert all values to floats with one transfer, and one synchronization, per device."""
    floats = [0.0] * len(values)
    by_device: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, int | float):
            floats[index] = float(value)
        else:
            by_device.setdefault(value.device, []).append(index)
    for indices in by_device.values():
        # imported only if there is a tensor: the package works without torch
        import torch

        for index, number in zip(
            indices, torch.stack([torch.as_tensor(values[i]).double() for i in indices]).tolist(), strict=True
        ):
            floats[index] = number
    return floats


def _combine(values: list[float], reduce: Reduce) -> float:
    if reduce == "sum":
        return sum(values)
    if reduce == "mean":
        return sum(values) / len(values)
    if reduce == "max":
        # max() of Python ignores NaN or returns it, depending on the order
        return math.nan if any(math.isnan(value) for value in values) else max(values)
    return values[-1]


class MetricsWriter:
    """Writes ``metrics.jsonl``, ``metrics_schema.json`` and ``tensorboard/`` of a run, on one rank.

    Raises:
        ModuleNotFoundError: ``tensorboard`` is true and the package is not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._folder = folder
        self._lines = JsonLines(folder / "metrics.jsonl")
        self._schema_path = folder / "metrics_schema.json"
        self._schema: dict[str, dict[str, str]] = {}
        self._use_tensorboard = tensorboard
        self._summary: Any = None
        if tensorboard:
            # at the start of the run instead of after its first iteration
            _summary_writer_class()

    def truncate_after(self, iteration: int) -> None:
        """Prepare for a run that resumes after ``iteration`` (0: a new run).

        Lines of later iterations and a truncated last line move to ``metrics.superseded.jsonl``, so that ``metrics.jsonl``
        has each iteration once and nothing is lost.
        """
        self._lines.truncate_after(iteration)

    def declare(self, metrics: Iterable[Metric]) -> None:
        """Declare metrics; ``metrics_schema.json`` is rewritten for new ones.

        Raises:
            ValueError: A name was declared with another unit or reduction.
        """
        known = len(self._schema)
        for metric in metrics:
            rule = {"unit": metric.unit, "reduce": metric.reduce}
            if self._schema.setdefault(metric.name, rule) != rule:
                raise ValueError(
                    f"metric {metric.name!r} was declared as {self._schema[metric.name]}, not {rule}"
                )
        if len(self._schema) > known:
            old = (
                json.loads(self._schema_path.read_text()) if self._schema_path.is_file() else {}
            )  # resumed run
            replace_text(
                self._schema_path, json.dumps({**old, **self._schema}, indent=1, sort_keys=True) + "\n"
            )

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append one line, flush, and add the TensorBoard scalars.

        Args:
            iteration: From 1.
            values: Name to number, already reduced over ranks.

        Raises:
            ValueError: A name was never declared.
        """
        # TensorBoard and metrics.jsonl have no place for units, so every name must be in the schema
        undeclared = values.keys() - self._schema.keys()
        if undeclared:
            raise ValueError(f"metrics {sorted(undeclared)} have no unit and reduction; call declare() first")
        non_finite = {name: repr(float(value)) for name, value in values.items() if not math.isfinite(value)}
        line: dict[str, Any] = {"iteration": iteration}
        line.update({name: None if name in non_finite else value for name, value in values.items()})
        if non_finite:
            line["non_finite"] = non_finite
        self._lines.append(line)
        if self._use_tensorboard:
            self._write_scalars(iteration, values)

    def _write_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        if self._summary is None:
            # purge_step hides scalars that an earlier attempt wrote for the same iterations
            folder = str(self._folder / "tensorboard")
            self._summary = _summary_writer_class()(folder, purge_step=iteration, flush_secs=10)
        for name, value in values.items():
            self._summary.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close all files."""
        self._lines.close()
        if self._summary is not None:
            self._summary.close()
            self._summary = None


class SampleWriter:
    """Writes ``samples.jsonl``: a few prompts and completions of every iteration, as text."""

    def __init__(self, folder: Path) -> None:
        self._lines = JsonLines(folder / "samples.jsonl")

    def truncate_after(self, iteration: int) -> None:
        """Same as ``MetricsWriter.truncate_after``, for ``samples.jsonl``."""
        self._lines.truncate_after(iteration)

    def write(
        self,
        iteration: int,
        *,
        file: int,
        row: int,
        prompt: str,
        completion: str,
        finish_reason: str,
        is_on_policy: bool,
        weight_version: int,
    ) -> None:
        """Append one sample and flush; ``file`` and ``row`` locate its prompt in the data."""
        self._lines.append(
            {
                "iteration": iteration,
                "file": file,
                "row": row,
                "prompt": prompt,
                "completion": completion,
                "finish_reason": finish_reason,
                "is_on_policy": is_on_policy,
                "weight_version": weight_version,
            }
        )

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "logging.tensorboard needs the package tensorboard; install it or set it to false"
        ) from error
    return SummaryWriter
