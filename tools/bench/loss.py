"""Time, memory and accuracy of the losses beside other systems' on this machine; see --help."""

import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from contenders import Contender, liger, modelopt, ours, ours_from_hidden, trl
from harness import (
    REFUSED,
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
from torch import Tensor

from megatron_gkd.losses.verify.reference import dense_divergence, relative_error

HIDDEN_SIZE = 64
CHECKED_ROWS = 32
PEERS = ("trl", "nvidia-modelopt", "liger-kernel")
COLUMNS = {
    "scene": "",
    "divergence": "",
    "contender": "",
    "cpu_ms": ".0f",
    "cpu_ms_min": ".0f",
    "wall_ms": ".0f",
    "peak_shards": ".3g",
    "value_error": ".1e",
    "gradient_error": ".1e",
    "bytes_per_token": ".0f",
    "first_call_s": ".1f",
}


class Scene(NamedTuple):
    """What is computed, by whom."""

    tp_size: int
    tokens: int
    vocab: int
    dtype: torch.dtype
    contenders: tuple[Callable[[], Contender], ...]
    from_hidden: bool = False

    def __str__(self) -> str:
        what = " from hidden states" if self.from_hidden else ""
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.tokens} x {self.vocab} {name} TP{self.tp_size}{what}"


def jsd() -> Contender:
    """Ours."""
    return ours("jsd")


def forward_kl() -> Contender:
    """Ours."""
    return ours("forward_kl")


def eager_jsd() -> Contender:
    """Ours, without a compiler."""
    return ours("jsd", "eager")


LOGITS = (jsd, eager_jsd, trl, forward_kl, modelopt)
SCENES = {
    "gates": Scene(2, 2048, 32000, torch.float32, LOGITS),
    "bf16": Scene(2, 2048, 32000, torch.bfloat16, LOGITS),
    "large": Scene(1, 128, 151936, torch.float32, LOGITS),
    "hidden": Scene(1, 2048, 32000, torch.float32, (ours_from_hidden, liger), from_hidden=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every gate is kept, 1 if not, 2 if nothing was measured."""
    parser = make_parser("loss.py", "Compare the losses with TRL, NVIDIA ModelOpt and Liger-Kernel.")
    parser.add_argument("--scene", nargs="+", choices=SCENES, default=list(SCENES))
    options = parser.parse_args(argv)
    if missing := [name for name in PEERS if not _version(name)]:
        sys.stderr.write(
            f"refused: {', '.join(missing)} not installed; `make bench` installs what is compared\n"
        )
        return REFUSED
    refuse_if_busy(options.force)
    sys.stdout.write(", ".join(f"{name} {_version(name)}" for name in ("torch", *PEERS)) + "\n")
    rows: list[dict[str, Any]] = []
    for name in options.scene:
        rows += on_ranks(SCENES[name].tp_size, measure_scene, name, options.repeats)
    sys.stdout.write(table(rows, COLUMNS))
    if options.plot is not None:
        plot(rows, options.plot)
    return finish(rows, make_gates(rows) if "gates" in options.scene else [], options.json)


def make_gates(rows: Sequence[dict[str, Any]]) -> list[Gate]:
    """How many times the peers' time and memory is ours."""
    own = {(row["divergence"], row["contender"]): row for row in rows if row["scene"] == str(SCENES["gates"])}
    gates = []
    for short, divergence, label, peer, time_bound, peak_bound in (
        ("jsd", "jsd", "trl", "gather + TRL", 15, 300),
        ("fkl", "forward_kl", "modelopt", "ModelOpt", 7, 100),
    ):
        mine, other = own[divergence, "ours, compiled"], own[divergence, peer]
        gates += [
            Gate(f"{short}_time_vs_{label}", other["cpu_ms"] / mine["cpu_ms"], time_bound, ">="),
            Gate(f"{short}_peak_vs_{label}", other["peak_shards"] / mine["peak_shards"], peak_bound, ">="),
        ]
    return gates


def measure_scene(rank: int, tp_size: int, name: str, repeats: int) -> list[dict[str, Any]]:
    """One row for each contender, from this rank's point of view; contenders take turns."""
    scene = SCENES[name]
    contenders = [make() for make in scene.contenders]
    runs = [contender.make(tp_size) for contender in contenders]
    inputs = _make_inputs(scene, rank)
    few = tuple(x[:CHECKED_ROWS] if i % 2 == 0 or not scene.from_hidden else x for i, x in enumerate(inputs))
    firsts = [timed(_call(run, few)).wall_ms / 1e3 for run in runs]
    errors = [_errors(run, few, c.divergence, scene, rank) for run, c in zip(runs, contenders, strict=True)]
    sent = [_sent(run, few) for run in runs]
    peaks = [peak_bytes(_call(run, inputs)) for run in runs]
    times = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            own.append(timed(_call(run, inputs)))
    shard = scene.tokens * scene.vocab // tp_size * scene.dtype.itemsize
    return [
        {
            "scene": str(scene),
            "divergence": contender.divergence,
            "contender": contender.name,
            "cpu_ms": statistics.median(t.cpu_ms for t in own),
            "cpu_ms_min": min(t.cpu_ms for t in own),
            "wall_ms": statistics.median(t.wall_ms for t in own),
            "peak_shards": peak / shard,
            "value_error": error[0],
            "gradient_error": error[1],
            "bytes_per_token": num_bytes / CHECKED_ROWS,
            "first_call_s": first,
        }
        for contender, own, peak, error, num_bytes, first in zip(
            contenders, times, peaks, errors, sent, firsts, strict=True
        )
    ]


def _call(run: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A call of ``run`` on copies that are made now; the student's want gradients."""
    copies = [x.clone() for x in inputs]
    for x in copies[: len(copies) // 2]:
        x.requires_grad_()

    def call() -> None:
        run(*copies)

    return call


def _make_inputs(scene: Scene, rank: int) -> tuple[Tensor, ...]:
    """(student, teacher) logits of this rank's shard, or (hidden, head) of the student and of the teacher."""
    rng = torch.Generator().manual_seed(rank)
    if scene.from_hidden:
        teacher_TH = torch.randn(scene.tokens, HIDDEN_SIZE, generator=rng)
        teacher_VH = torch.randn(scene.vocab, HIDDEN_SIZE, generator=rng) * 3 / HIDDEN_SIZE**0.5
        student_TH = teacher_TH + 0.3 * torch.randn(teacher_TH.shape, generator=rng)
        return student_TH, teacher_VH.clone(), teacher_TH, teacher_VH
    teacher_TV = torch.randn(scene.tokens, scene.vocab // scene.tp_size, generator=rng) * 3
    student_TV = 0.7 * teacher_TV + torch.randn(teacher_TV.shape, generator=rng)
    return student_TV.to(scene.dtype), teacher_TV.to(scene.dtype)


def _errors(
    run: Callable[..., Any], inputs: Sequence[Tensor], divergence: str, scene: Scene, rank: int
) -> tuple[float, float]:
    """Relative L2 errors of the sum and of the gradient of this rank's logits (or hidden states), against float64."""
    copies = [x.clone() for x in inputs]
    for x in copies[: len(copies) // 2]:
        x.requires_grad_()
    value, grad = run(*copies)
    if scene.from_hidden:
        leaf, head_VH, teacher_TH, teacher_VH = (x.double() for x in inputs)
        leaf.requires_grad_()
        student, teacher = leaf @ head_VH.T, teacher_TH @ teacher_VH.T
    else:
        parts = [[torch.empty_like(x) for _ in range(scene.tp_size)] for x in inputs]
        for gathered, x in zip(parts, inputs, strict=True):
            dist.all_gather(gathered, x)
        student, teacher = (torch.cat(gathered, -1).double() for gathered in parts)
        leaf = student.requires_grad_()
    want = dense_divergence(student, teacher, divergence).sum()
    (want_grad,) = torch.autograd.grad(want, leaf)
    if not scene.from_hidden:
        want_grad = want_grad.chunk(scene.tp_size, -1)[rank]
    return relative_error(value, want.detach()), relative_error(grad, want_grad)


def _sent(run: Callable[..., Any], inputs: Sequence[Tensor]) -> int:
    call = _call(run, inputs)
    with SentBytes() as sent:
        call()
    return sent.total


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """CPU time and peak memory of every row, as bars."""
    try:
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.stderr.write("no plot: matplotlib is not installed\n")
        return
    names = [f"{row['scene']}\n{row['divergence']}: {row['contender']}" for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1 + 0.45 * len(rows)), sharey=True)
    for axis, key, label in (
        (axes[0], "cpu_ms", "CPU ms per call of one rank"),
        (axes[1], "peak_shards", "peak extra memory, [T, V / tp] shards"),
    ):
        axis.barh(names, [row[key] for row in rows])
        axis.set_xscale("log")
        axis.set_xlabel(label)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
