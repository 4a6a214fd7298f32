"""Compare the loss and its gradients with a dense float64 reference."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gkd.cli import FAILED, run_tool
from megatron_gkd.config import GkdConfig, load_config, load_hf_shapes

if TYPE_CHECKING:
    import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/verify_loss.py``; return 0 if every loss is within its tolerance."""
    options = _parse(argv)
    rows: list[dict[str, Any]] = []
    code = run_tool(lambda: rows.extend(_certify_on_ranks(options)))
    if code:
        return code
    sys.stdout.write(_table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "gates": _gates(rows)}, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify_loss.py",
        description="Compare the loss and its gradients (of hidden states and LM head) with a dense float64 reference "
        "that shares no code with it. Without --config: every divergence on every support.",
    )
    parser.add_argument(
        "--tp", type=int, default=None, help="tensor-parallel size; default: that of --config, or 1"
    )
    parser.add_argument(
        "--config", type=Path, action="append", help="certify the loss of this configuration; repeatable"
    )
    parser.add_argument(
        "--dp", type=int, default=1, help="data-parallel size for --config, which its back end depends on"
    )
    parser.add_argument("--divergence", nargs="+", metavar="NAME", help="only these divergences")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--tokens-per-chunk", type=int, nargs="+", default=[16, 64], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(argv)
    if options.tp is not None and options.tp < 1:
        parser.error(f"--tp {options.tp} must be at least 1")
    if options.dp < 1:
        parser.error(f"--dp {options.dp} must be at least 1")
    return options


def _certify_on_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_gkd.losses import DIVERGENCES

    tp_size = options.tp
    if options.config:
        run = load_config(options.config)
        tp_size = tp_size or run.student.parallel.tensor_model_parallel_size
    for name in options.divergence or ():
        if name not in DIVERGENCES:
            raise ValueError(f"--divergence {name}: unknown; it is one of {', '.join(DIVERGENCES)}")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")  # fork cannot be used after CUDA is initialized
        arguments = [(rank, tp_size or 1, Path(folder), options) for rank in range(tp_size or 1)]
        processes = [context.Process(target=_certify_on_rank, args=own) for own in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a rank failed: exit codes {[process.exitcode for process in processes]}")
        return json.loads((Path(folder) / "rows.json").read_text())


def _certify_on_rank(rank: int, tp_size: int, folder: Path, options: argparse.Namespace) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # torchrun's variable, by which detect_platform selects the GPU
    import torch
    import torch.distributed as dist

    from megatron_gkd.losses.verify.certificate import certify
    from megatron_gkd.platform.device import prepare_process

    torch.set_num_threads(1)  # all ranks share the cores
    platform = prepare_process()
    # rendezvous through a file: no port to collide with another run
    dist.init_process_group(
        platform.collective_backend, init_method=f"file://{folder}/ranks", rank=rank, world_size=tp_size
    )
    cases = _cases(options, tp_size, platform.device)
    certificates = [certify(case, group=dist.group.WORLD, device=platform.device) for case in cases]
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps([_row(certificate) for certificate in certificates]))
    dist.destroy_process_group()


def _cases(options: argparse.Namespace, tp_size: int, device: "torch.device") -> list[Any]:
    import torch

    from megatron_gkd.losses.verify.problem import every_case

    if options.config:
        from megatron_gkd.train.loss import cases_of_run

        config = _as_trained(load_config(options.config), tp_size, options.dp, device)
        return cases_of_run(config, device)
    dtypes = [{"fp32": torch.float32, "bf16": torch.bfloat16}[name] for name in options.dtype]
    return [
        case
        for dtype in dtypes
        for tokens_per_chunk in options.tokens_per_chunk
        for case in every_case(options.divergence, dtype=dtype, tokens_per_chunk=tokens_per_chunk)
    ]


def _as_trained(config: GkdConfig, tp_size: int, dp_size: int, device: "torch.device") -> GkdConfig:
    """The configuration at TP ``tp_size``, with the loss back end that the trainer would select."""
    from megatron_gkd.train.backend import with_backend
    from megatron_gkd.train.setup import build_tokenizer, with_iterations

    if config.train.epochs:
        config = with_iterations(config, build_tokenizer(config))
    parallel = config.student.parallel.model_copy(update={"tensor_model_parallel_size": tp_size})
    student = config.student.model_copy(update={"parallel": parallel})
    return with_backend(
        config.model_copy(update={"student": student}),
        tp_size=tp_size,
        dp_size=dp_size,
        vocab_size=load_hf_shapes(student.hf_folder).vocab_size,
        device=device,
    )


def _row(certificate: Any) -> dict[str, Any]:
    case, (value_bound, gradient_bound) = certificate.case, certificate.bounds
    return {
        "loss": str(case),
        "dtype": str(case.dtype).removeprefix("torch."),
        "tp": certificate.tp_size,
        "tokens_per_chunk": case.tokens_per_chunk,
        "backend": None if case.settings is None else case.settings.backend,
        "value_error": certificate.value_error,
        "student_error": certificate.student_error,
        "head_error": certificate.head_error,
        "value_bound": value_bound,
        "gradient_bound": gradient_bound,
        "passed": certificate.is_passed,
    }


def _gates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest errors of each dtype with their bounds."""
    gates = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        gradient = max(max(row["student_error"], row["head_error"]) for row in own)
        for name, value, bound in (
            ("value_error", max(row["value_error"] for row in own), own[0]["value_bound"]),
            ("gradient_error", gradient, own[0]["gradient_bound"]),
        ):
            gates.append({"name": f"{name}_{dtype}", "value": value, "bound": bound, "sense": "<="})
    return gates


def _table(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["loss"]) for row in rows)
    lines = [f"{'loss':{width}}  dtype     tp chunk  value    hidden   head"]
    lines += [
        f"{row['loss']:{width}}  {row['dtype']:8} {row['tp']:3} {row['tokens_per_chunk']:5}  {row['value_error']:.1e}  "
        f"{row['student_error']:.1e}  {row['head_error']:.1e}" + ("" if row["passed"] else "  WRONG")
        for row in rows
    ]
    num_wrong = sum(not row["passed"] for row in rows)
    verdict = (
        f"{num_wrong} of {len(rows)} losses are WRONG" if num_wrong else f"all {len(rows)} losses are right"
    )
    return "\n".join([*lines, verdict]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
