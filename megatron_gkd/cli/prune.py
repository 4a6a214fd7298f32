"""Command that makes a smaller student from a Hugging Face checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_gkd.cli.outcome import run_tool
from megatron_gkd.families import FAMILIES

CALIBRATION_TOKENS = 8192


def main(argv: Sequence[str] | None = None) -> int:
    """``tools/prune_hf.py``."""
    parser = argparse.ArgumentParser(
        description=f"Write a smaller student from a Hugging Face folder ({', '.join(FAMILIES)}): layers and FFN "
        "channels dropped by measured effect, the rest refitted, query groups filled up for tensor parallelism."
    )
    parser.add_argument(
        "--hf", type=Path, required=True, help="the teacher: config.json, *.safetensors and the tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="completions that the teacher wrote (JSONL)"
    )
    parser.add_argument(
        "--keep-ratio", type=float, default=0.85, help="most parameters, as a share of the teacher's"
    )
    parser.add_argument("--layers", type=int, help="layers to keep (default: all)")
    parser.add_argument(
        "--ffn", type=int, help="FFN channels to keep (default: what --keep-ratio leaves room for)"
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor-parallel ranks the student must be divisible by"
    )
    parser.add_argument(
        "--tokens", type=int, default=CALIBRATION_TOKENS, help="calibration tokens, prompts included"
    )
    parser.add_argument(
        "--no-refit",
        action="store_true",
        help="keep the teacher's weights in what remains instead of fitting them",
    )
    options = parser.parse_args(argv)
    return run_tool(lambda: _prune(options))


def _prune(options: argparse.Namespace) -> None:
    from megatron_gkd.checkpoint.prune import prune_checkpoint
    from megatron_gkd.checkpoint.prune_measure import CalibrationRow
    from megatron_gkd.report.held_out import load_completions

    if options.out.exists():
        raise FileExistsError(f"{options.out} exists; remove it or give another --out")
    rows, num_tokens = [], 0
    for completion in load_completions(options.calibration):
        if num_tokens >= options.tokens:
            break
        rows.append(
            CalibrationRow(completion.prompt_ids + completion.completion_ids, len(completion.prompt_ids))
        )
        num_tokens += len(rows[-1].ids)
    report = prune_checkpoint(
        options.hf,
        options.out,
        rows,
        keep_ratio=options.keep_ratio,
        tp_size=options.tp,
        num_layers=options.layers,
        ffn_hidden_size=options.ffn,
        refits=not options.no_refit,
    )
    sys.stdout.write(
        f"{options.out}: {report.num_parameters / 1e6:.1f} M parameters ({report.kept_ratio:.1%}), "
        f"{report.num_layers} layers (without {list(report.dropped_layers)}), "
        f"{report.ffn_hidden_size} FFN channels, {report.num_attention_heads} heads, "
        f"{report.num_query_groups} query groups; KL {report.kl:.3f} nats/token on the calibration text\n"
    )


if __name__ == "__main__":
    sys.exit(main())
