"""Prune a Hugging Face checkpoint to a smaller student."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_gkd.cli import run_tool
from megatron_gkd.families import FAMILIES

CALIBRATION_TOKENS = 8192


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/prune_hf.py``."""
    parser = argparse.ArgumentParser(
        description=f"Prune a Hugging Face checkpoint ({', '.join(FAMILIES)}): remove the layers and FFN channels with the "
        "smallest measured effect, refit the remaining weights, and pad query groups for tensor parallelism."
    )
    parser.add_argument(
        "--hf", type=Path, required=True, help="the teacher: config.json, *.safetensors and the tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder; must not exist")
    parser.add_argument("--calibration", type=Path, required=True, help="completions of the teacher (JSONL)")
    parser.add_argument(
        "--keep-ratio", type=float, default=0.85, help="maximum number of parameters, relative to the teacher"
    )
    parser.add_argument("--layers", type=int, help="layers to keep (default: all)")
    parser.add_argument(
        "--ffn", type=int, help="FFN channels to keep (default: as many as --keep-ratio allows)"
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor-parallel size that the student must support"
    )
    parser.add_argument(
        "--tokens", type=int, default=CALIBRATION_TOKENS, help="calibration tokens, including prompts"
    )
    parser.add_argument(
        "--no-refit",
        action="store_true",
        help="keep the remaining weights as they are",
    )
    options = parser.parse_args(argv)
    return run_tool(lambda: _prune(options))


def _prune(options: argparse.Namespace) -> None:
    from megatron_gkd.checkpoint.prune import prune_checkpoint
    from megatron_gkd.checkpoint.prune_measure import CalibrationRow
    from megatron_gkd.report.held_out import load_completions

    # before the teacher is loaded and measured, which takes minutes
    if options.out.exists():
        raise FileExistsError(f"remove {options.out} or give another --out: it exists")
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
