"""How time, memory and traffic of the loss grow with vocabulary, tokens and tensor-parallel size; see --help."""

import math
import statistics
import sys
from collections.abc import Sequence
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
VOCABS = (16384, 32768, 65536, 131072)
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
    "bytes_per_token": ".0f",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every gate is kept, 1 if not, 2 if nothing was measured."""
    parser = make_parser(
        "scaling.py",
        "Fit exponents of the loss's time and memory against vocabulary and tokens; count traffic.",
    )
    parser.add_argument("--divergence", nargs="+", default=["jsd", "forward_kl"], metavar="NAME")
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
    """One row for each size; sizes take turns, and the fastest of a size's calls counts. The memory holds both logits."""
    sizes = sorted({(COMMON[0], vocab) for vocab in VOCABS} | {(tokens, COMMON[1]) for tokens in TOKENS})
    rows = []
    for divergence in divergences:
        run = ours(divergence).make(tp_size)
        times: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
        for i in range(repeats + 1):
            for size in sizes:
                inputs = _make_inputs(*size)
                cpu_ms = timed(partial(run, *inputs)).cpu_ms
                if i > 0:  # the first one compiles
                    times[size].append(cpu_ms)
        for size, own in times.items():
            inputs = _make_inputs(*size)
            memory = peak_bytes(partial(run, *inputs)) + sum(logits_TV.nbytes for logits_TV in inputs)
            rows.append(
                {
                    "divergence": divergence,
                    "tp": tp_size,
                    "tokens": size[0],
                    "vocab_per_rank": size[1],
                    "cpu_ms": min(own),
                    "cpu_ms_median": statistics.median(own),
                    "memory_bytes": memory,
                }
            )
    return rows


def count_bytes(rank: int, tp_size: int, divergences: Sequence[str]) -> list[dict[str, Any]]:
    """What a rank sends for a token; the number depends on no clock and no back end."""
    rows = []
    for divergence in divergences:
        run, inputs = ours(divergence, "eager").make(tp_size), _make_inputs(64, 512)
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
    for measured, name in (("cpu_ms", "time"), ("memory_bytes", "memory")):
        for grown, fixed, value in (
            ("vocab_per_rank", "tokens", COMMON[0]),
            ("tokens", "vocab_per_rank", COMMON[1]),
        ):
            exponents = [_exponent(part, grown, measured) for part in _parts(timed_rows, fixed, value)]
            worst = max(exponents, key=lambda exponent: abs(exponent - 1))
            gate = f"{name}_exponent_{grown.partition('_')[0]}"
            gates += [Gate(gate, worst, 1.05, "<="), Gate(gate, worst, 0.95, ">=")]
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


def _make_inputs(tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    teacher_TV = torch.randn(tokens, vocab)
    return (0.7 * teacher_TV).requires_grad_(), teacher_TV


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
