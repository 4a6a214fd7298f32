"""Metrics of an iteration: collected on every rank, written by one.

``metrics.jsonl`` holds one JSON object per iteration. JSON has no NaN or infinity: such a value is written as null, and
the key ``non_finite`` maps its name to "nan", "inf" or "-inf". ``metrics_schema.json`` states unit and reduction of
every metric. TensorBoard gets the same scalars.
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
"""How the values of all ranks become one; ``rank0``: equal everywhere, or known to rank 0 only."""


@dataclass(frozen=True)
class Metric:
    """A number with what is needed to read it and to reduce it over ranks."""

    name: str
    value: float
    unit: str
    reduce: Reduce


class Metrics:
    """Collects one rank's metrics between two calls of ``take``.

    Several values of one name become one by the metric's own rule: sum, max, mean, or the last for ``rank0``.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = {}
        self._rules: dict[str, tuple[str, Reduce]] = {}

    def add(self, name: str, value: float | Tensor, *, unit: str, reduce: Reduce) -> None:
        """Note a value; a tensor is not read (and its device not waited for) before ``take``.

        Args:
            name: For example ``loss`` or ``rollout/completion_length``.
            value: Number or 0-d tensor of any dtype; the tensor is copied, so it may change afterwards.
            unit: For example ``nats/token``, ``s``, ``tokens``, ``1`` for a plain number.
            reduce: How values, and later ranks, are put together.

        Raises:
            ValueError: Unknown reduction, no unit, not a scalar, or the name is known with another unit or reduction.
        """
        if reduce not in get_args(Reduce) or not unit:
            raise ValueError(
                f"metric {name!r} needs a unit and a reduction of {get_args(Reduce)}, got {unit!r}, {reduce!r}"
            )
        if self._rules.setdefault(name, (unit, reduce)) != (unit, reduce):
            raise ValueError(f"metric {name!r} has (unit, reduce) {self._rules[name]}, not {(unit, reduce)}")
        if not isinstance(value, int | float):
            if value.ndim != 0:
                raise ValueError(f"metric {name!r} must be a scalar, got shape {tuple(value.shape)}")
            value = value.detach().clone()
        self._values.setdefault(name, []).append(value)

    def take(self) -> list[Metric]:
        """The metrics since the last call, in the order in which they first appeared; starts anew."""
        names = list(self._values)
        floats = iter(_to_floats([value for name in names for value in self._values[name]]))
        metrics = []
        for name in names:
            unit, reduce = self._rules[name]
            values = [next(floats) for _ in self._values[name]]
            metrics.append(Metric(name, _put_together(values, reduce), unit, reduce))
        self._values = {}
        return metrics


def _to_floats(values: list[float | Tensor]) -> list[float]:
    """All values as Python floats, with one transfer for all tensors of a device."""
    floats = [0.0] * len(values)
    by_device: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, int | float):
            floats[index] = float(value)
        else:
            by_device.setdefault(value.device, []).append(index)
    for indices in by_device.values():
        import torch  # only where a tensor came in: the rest of this package works without torch

        for index, number in zip(
            indices, torch.stack([torch.as_tensor(values[i]).double() for i in indices]).tolist(), strict=True
        ):
            floats[index] = number
    return floats


def _put_together(values: list[float], reduce: Reduce) -> float:
    if reduce == "sum":
        return sum(values)
    if reduce == "mean":
        return sum(values) / len(values)
    if reduce == "max":  # max() passes over NaN or not, depending on the order
        return math.nan if any(math.isnan(value) for value in values) else max(values)
    return values[-1]


class MetricsWriter:
    """Writes ``metrics.jsonl``, ``metrics_schema.json`` and ``tensorboard/`` of a run; used by one rank only.

    Raises:
        ModuleNotFoundError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._folder = folder
        self._lines = JsonLines(folder / "metrics.jsonl")
        self._schema_path = folder / "metrics_schema.json"
        self._schema: dict[str, dict[str, str]] = {}
        self._use_tensorboard = tensorboard
        self._summary: Any = None
        if tensorboard:
            _summary_writer_class()

    def truncate_after(self, iteration: int) -> None:
        """Call at the start of a run that continues behind ``iteration`` (0: from the beginning).

        Lines of later iterations, and a last line torn by a kill, move to ``metrics.superseded.jsonl``, so that
        ``metrics.jsonl`` will hold each iteration once and nothing is lost.
        """
        self._lines.truncate_after(iteration)

    def declare(self, metrics: Iterable[Metric]) -> None:
        """State unit and reduction of metrics; ``metrics_schema.json`` is rewritten when a new one appears.

        Raises:
            ValueError: A name was declared before with another unit or reduction.
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
        """Append one line, flushed, and the TensorBoard scalars.

        Args:
            iteration: Counted from 1.
            values: Name to number, already reduced over ranks.

        Raises:
            ValueError: A name was never declared.
        """
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
            # purge_step hides what an earlier attempt wrote for the same iterations
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
    """Writes ``samples.jsonl``: some prompts and completions of every iteration, as text."""

    def __init__(self, folder: Path) -> None:
        self._lines = JsonLines(folder / "samples.jsonl")

    def truncate_after(self, iteration: int) -> None:
        """As ``MetricsWriter.truncate_after``; lines move to ``samples.superseded.jsonl``."""
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
        """Append one sample, flushed: its file and row in the data, and decoded text."""
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
