"""How time, memory and traffic of the loss grow with vocabulary, tokens and tensor-parallel size; see --help."""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import ours
from harness import (
    Gate,
    SentBytes,
    finish,
    make_parser,
    on_ranks,
    peak_bytes,
    refuse_if_busy,
    table,
    timed,
)

# the smallest takes tens of milliseconds: a call's fixed cost of 2 to 3 would otherwise flatten the line
COMMON = (2048, 16384)  # tokens, and vocabulary of one rank
VOCABS = (8192, 16384, 32768, 65536)
TOKENS = (1024, 2048, 4096, 8192)
TP_SIZES = (1, 2)
COUNTED_TP_SIZES = (2, 4)
COLUMNS = {
    "divergence": "",
    "tp": "",
    "tokens": "",
    "vocab_per_rank": "",
    "cpu_ms": ".1f",
    "memory_bytes": ".4g",
    "scratch_share": ".4f",
    "bytes_per_token": ".0f",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every gate is kept, 1 if not, 2 if nothing was measured."""
    parser = make_parser(
        "scaling.py",
        "Fit exponents of the loss's time and memory against vocabulary and tokens; count traffic.",
    )
    parser.add_argument("--divergence", nargs="+", default=["jsd", "forward_kl"], metavar="NAME")
    parser.set_defaults(repeats=21)
    options = parser.parse_args(argv)
    refuse_if_busy(options.force)
    rows: list[dict[str, Any]] = []
    for tp_size in TP_SIZES:
        rows += on_ranks(tp_size, measure, options.divergence, options.repeats)
    for tp_size in COUNTED_TP_SIZES:
        rows += on_ranks(tp_size, count_bytes, options.divergence)
    sys.stdout.write(table(rows, COLUMNS))
    if options.plot is not None:
        plot(rows, options.plot)
    return finish(rows, make_gates(rows), options.json)


def measure(rank: int, tp_size: int, divergences: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """One row for each size, with the fastest of its samples; in every round each size has a turn.

    A sample is as many calls of its size as go through the logits of the largest: samples of all sizes take equally long, so that
    none finds a fast second of the machine more easily, and read equally much memory. The memory of a row holds both logits.
    """
    sizes = sorted({(COMMON[0], vocab) for vocab in VOCABS} | {(tokens, COMMON[1]) for tokens in TOKENS})
    stores = _Stores(max(tokens * vocab for tokens, vocab in sizes))
    rows = []
    for divergence in divergences:
        run = ours(divergence).make(tp_size)
        times: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
        for size in sizes:
            run(*stores.filled(*size)[0])  # compiles
        for i in range(repeats):
            for size in sizes[:: -1 if i % 2 else 1]:  # there and back: a drift of the machine cancels out
                inputs = stores.filled(*size)
                times[size].append(timed(partial(_call_each, run, inputs)).cpu_ms / len(inputs))
        for size, own in times.items():
            inputs = stores.filled(*size)[0]
            scratch, logits = peak_bytes(partial(run, *inputs)), sum(logits_TV.nbytes for logits_TV in inputs)
            rows.append(
                {
                    "divergence": divergence,
                    "tp": tp_size,
                    "tokens": size[0],
                    "vocab_per_rank": size[1],
                    "cpu_ms": min(own),
                    "cpu_ms_median": statistics.median(own),
                    "memory_bytes": logits + scratch,
                    "scratch_share": scratch / logits,
                }
            )
    return rows


def _call_each(run: Callable[..., Any], inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for student_TV, teacher_TV in inputs:
        run(student_TV, teacher_TV)


class _Stores:
    """Memory of the largest logits (twice, and random numbers), used for all sizes: no call pays for fresh pages."""

    def __init__(self, size: int):
        self._random = torch.randn(size)
        self._student, self._teacher = torch.empty(size), torch.empty(size)

    def filled(self, tokens: int, vocab: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All of it as logits of the student, which ask for a gradient, and of the teacher: as many pairs as it holds."""
        self._teacher.copy_(self._random)
        torch.mul(self._random, 0.7, out=self._student)
        return [
            (student.view(tokens, vocab).requires_grad_(), teacher.view(tokens, vocab))
            for student, teacher in zip(
                self._student.split(tokens * vocab), self._teacher.split(tokens * vocab), strict=True
            )
        ]


def count_bytes(rank: int, tp_size: int, divergences: Sequence[str]) -> list[dict[str, Any]]:
    """What a rank sends for a token; the number depends on no clock and no back end."""
    rows = []
    for divergence in divergences:
        run, inputs = ours(divergence, "eager").make(tp_size), _Stores(64 * 512).filled(64, 512)[0]
        with SentBytes() as sent:
            run(*inputs)
        rows.append({"divergence": divergence, "tp": tp_size, "bytes_per_token": sent.total / 64})
    return rows


def make_gates(rows: Sequence[dict[str, Any]]) -> list[Gate]:
    """The exponents, that of the worst divergence and tensor-parallel size; and how much the traffic differs."""
    timed_rows = [row for row in rows if "cpu_ms" in row]
    sent = {
        (row["divergence"], row["tp"]): row["bytes_per_token"] for row in rows if "bytes_per_token" in row
    }
    few, many = COUNTED_TP_SIZES
    growth = max(sent[name, many] / sent[name, few] for name in {name for name, _ in sent})
    gates = []
    for measured, prefix in (("cpu_ms", ""), ("memory_bytes", "memory_")):
        for grown, fixed, value in (
            ("vocab_per_rank", "tokens", COMMON[0]),
            ("tokens", "vocab_per_rank", COMMON[1]),
        ):
            exponents = [_exponent(part, grown, measured) for part in _parts(timed_rows, fixed, value)]
            worst = max(exponents, key=lambda exponent: abs(exponent - 1))
            gate = f"{prefix}exponent_{grown.partition('_')[0]}"
            gates += [Gate(gate, worst, 1.05, "<="), Gate(gate, worst, 0.95, ">=")]
    gates.append(Gate("scratch_share", max(row["scratch_share"] for row in timed_rows), 0.05, "<="))
    return [*gates, Gate("bytes_growth_tp", growth, 1.0, "<=")]


def _parts(rows: Sequence[dict[str, Any]], key: str, value: int) -> list[list[dict[str, Any]]]:
    kinds = sorted({(row["divergence"], row["tp"]) for row in rows})
    return [
        [row for row in rows if (row["divergence"], row["tp"]) == kind and row[key] == value]
        for kind in kinds
    ]


def _exponent(rows: Sequence[dict[str, Any]], size: str, measured: str) -> float:
    """Slope of the logarithm of what was measured over that of the size, by least squares."""
    x, y = ([math.log(row[key]) for row in rows] for key in (size, measured))
    return statistics.linear_regression(x, y).slope


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time over the number of logits."""
    try:
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.stderr.write("no plot: matplotlib is not installed\n")
        return
    figure, axis = plt.subplots()
    for divergence, tp_size in sorted({(row["divergence"], row["tp"]) for row in rows if "cpu_ms" in row}):
        own = [
            row for row in rows if (row["divergence"], row["tp"]) == (divergence, tp_size) and "cpu_ms" in row
        ]
        points = sorted((row["tokens"] * row["vocab_per_rank"], row["cpu_ms"]) for row in own)
        axis.loglog(*zip(*points, strict=True), marker="o", label=f"{divergence}, TP{tp_size}")
    axis.set_xlabel("tokens x vocabulary of one rank")
    axis.set_ylabel("CPU ms of one rank")
    axis.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
