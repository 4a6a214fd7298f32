"""Rows and states of the GPU check's stages, and the JSON and Markdown files made of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PASSED, FAILED, ERROR, CRASHED, TIMED_OUT = "passed", "failed", "error", "crashed", "timed out"


@dataclass(frozen=True)
class Row:
    """One number or fact of a stage; ``passed`` is None where nothing is required of it."""

    check: str
    value: float | str
    unit: str = ""
    bound: float | None = None
    passed: bool | None = None


class StageReport:
    """Rows of one stage, appended to a file at once: a crash or a timeout keeps those before it."""

    def __init__(self, file: Path):
        self._file = file
        file.write_text("")

    def at_most(self, check: str, value: float, bound: float, unit: str) -> None:
        """Add a number with its upper bound; NaN fails."""
        self._append(Row(check, value, unit, bound, value <= bound))

    def holds(self, check: str, passed: bool, value: str) -> None:
        """Add a condition; ``value`` is what was found."""
        self._append(Row(check, value, passed=passed))

    def measured(self, check: str, value: float | str, unit: str = "") -> None:
        """Add a number or a fact without a bound."""
        self._append(Row(check, value, unit))

    def _append(self, row: Row) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def read_rows(file: Path) -> list[Row]:
    """The complete lines of a ``StageReport``'s file."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class StageResult:
    """A finished stage."""

    name: str
    proves: str
    state: str
    seconds: float
    rows: Sequence[Row] = ()
    error: str = ""

    @property
    def has_passed(self) -> bool:
        """Whether the stage ended by itself and kept all its bounds."""
        return self.state == PASSED

    @property
    def verdict(self) -> str:
        """Number of checks and the failed ones, or the last line of the error."""
        if self.state in (ERROR, CRASHED, TIMED_OUT):
            return (self.error.strip().splitlines() or ["no message"])[-1]
        checked = [row for row in self.rows if row.passed is not None]
        missed = [row.check for row in checked if not row.passed]
        if missed:
            return f"{len(missed)} of {len(checked)} checks failed: {', '.join(missed[:3])}"
        return f"{len(checked)} checks, {len(self.rows) - len(checked)} measurements"


@dataclass
class CheckResult:
    """All stages of one run of the check."""

    is_smoke: bool
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    stages: list[StageResult] = field(default_factory=list)

    @property
    def has_passed(self) -> bool:
        """Whether every stage so far has passed."""
        return all(stage.has_passed for stage in self.stages)

    def write(self, folder: Path) -> None:
        """Write ``gpu_check.json`` and ``gpu_check.md``; called after every stage."""
        tree: dict[str, Any] = {
            "started": self.started,
            "smoke": self.is_smoke,
            "passed": self.has_passed,
            "stages": {stage.name: asdict(stage) for stage in self.stages},
        }
        (folder / "gpu_check.json").write_text(json.dumps(tree, indent=1) + "\n")
        (folder / "gpu_check.md").write_text(self._markdown())

    def _markdown(self) -> str:
        title = "Smoke run on a CPU: nothing here is a measurement of a GPU" if self.is_smoke else "GPU check"
        lines = [f"# {title}", "", f"Started {self.started}.", ""]
        lines += ["| stage | state | seconds | result |", "|---|---|---|---|"]
        lines += [
            f"| {stage.name} | {stage.state} | {stage.seconds:.1f} | {_cell(stage.verdict)} |"
            for stage in self.stages
        ]
        for stage in self.stages:
            lines += ["", f"## {stage.name}", "", stage.proves, ""]
            lines += ["| check | value | bound | passed |", "|---|---|---|---|"]
            lines += [_markdown_row(row) for row in stage.rows]
            if stage.error:
                lines += ["", "```", stage.error.rstrip(), "```"]
        return "\n".join(lines) + "\n"


def _markdown_row(row: Row) -> str:
    value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
    bound = "" if row.bound is None else f"<= {row.bound:g}"
    passed = {True: "yes", False: "**no**", None: ""}[row.passed]
    return f"| {_cell(row.check)} | {_cell(f'{value} {row.unit}'.strip())} | {bound} | {passed} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
