"""Bandwidth of the loss kernels on a GPU, beside that of a copy: GB/s of the logits that each pass has to move.

    python tools/bench/kernels.py --rows 1024 --vocab 151936 --dtype bfloat16

Exit status 2 where there is no CUDA device.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.losses.divergences import AdaptiveKL, WeightedKL, make_divergence
from megatron_gkd.losses.kernels import make_kernels
from megatron_gkd.losses.vocab_parallel import Temperatures

_NAMES = ("forward_kl", "mixed_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
_TAUS = Temperatures(1.0, 1.0)


def main() -> int:
    """Print one line for each pass of each divergence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--backend", default="triton", help="a name in megatron_gkd.losses.kernels.BACKENDS")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.accelerator.is_available():
        print("no CUDA device: the kernels' bandwidth can be measured on a GPU only", file=sys.stderr)  # noqa: T201
        return 2
    device = torch.accelerator.current_accelerator()
    student_TV = torch.randn(args.rows, args.vocab, device=device, dtype=getattr(torch, args.dtype))
    teacher_TV = student_TV + torch.randn_like(student_TV) / 3
    for name, units, run in passes(student_TV, teacher_TV, args.backend):
        seconds = median_seconds(run, args.repeats)
        rate = units * student_TV.nbytes / seconds / 1e9
        print(f"{name:34} {seconds * 1e3:8.3f} ms {rate:8.0f} GB/s")  # noqa: T201
    return 0


def passes(
    student_TV: Tensor, teacher_TV: Tensor, backend: str
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(name, how many times the bytes of one model's logits are moved, the pass)."""
    out_TV = torch.empty_like(student_TV)
    pair = student_TV, teacher_TV
    yield "copy", 2, lambda: out_TV.copy_(student_TV)
    for name in _NAMES:
        divergence = make_divergence(name, beta=0.5, alpha=0.1, weight=0.5)
        assert not isinstance(divergence, AdaptiveKL)  # which has no kernels of its own
        kernels = make_kernels(backend, divergence, _TAUS)
        first_TK = kernels.first(*pair)
        # any finite numbers will do: the passes take the same time
        stats_T6 = torch.ones(len(first_TK), 6, device=first_TK.device)
        yield f"{name} first", 2, lambda kernels=kernels: kernels.first(*pair)
        stats_TK = stats_T6[:, :5]
        if not isinstance(divergence, WeightedKL):
            stats_TK = stats_T6
            norms_T5 = stats_T6[:, :5].contiguous()
            yield f"{name} second", 2, lambda kernels=kernels, n=norms_T5: kernels.second(*pair, n)
        tail = stats_TK.contiguous(), stats_T6[:, 0].contiguous(), out_TV
        yield f"{name} gradient", 3, lambda kernels=kernels, tail=tail: kernels.gradient(*pair, *tail)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of ``repeats`` runs, after three that compile and warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


if __name__ == "__main__":
    sys.exit(main())
