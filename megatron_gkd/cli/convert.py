"""Convert checkpoints from Hugging Face to Megatron and back."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_gkd.cli import run_tool
from megatron_gkd.families import FAMILIES


def main_hf_to_megatron(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/convert_hf_to_megatron.py``."""
    parser = argparse.ArgumentParser(
        description=f"Write a Megatron checkpoint from a Hugging Face folder ({', '.join(FAMILIES)}; safetensors). "
        "The checkpoint can be loaded in any tensor- and pipeline-parallel layout."
    )
    parser.add_argument(
        "--hf", type=Path, required=True, help="folder with config.json, *.safetensors and the tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder; must not exist")
    options = parser.parse_args(argv)

    def convert(*job: Any) -> None:
        from megatron_gkd.checkpoint.hf import convert_hf_to_megatron

        convert_hf_to_megatron(options.hf, options.out, *job)

    return run_tool(lambda: _on_one_rank(convert))


def main_megatron_to_hf(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tools/convert_megatron_to_hf.py``."""
    parser = argparse.ArgumentParser(
        description="Write a Hugging Face folder, loadable by transformers and SGLang, from a Megatron checkpoint: "
        "a converted one or checkpoints/iter_<n> of a run."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--out", type=Path, required=True, help="output folder; must not exist")
    parser.add_argument(
        "--adapter", action="store_true", help="write only the adapters (student.lora), in PEFT's format"
    )
    options = parser.parse_args(argv)

    def convert(*job: Any) -> None:
        from megatron_gkd.checkpoint.hf import convert_megatron_to_hf, convert_megatron_to_peft

        write = convert_megatron_to_peft if options.adapter else convert_megatron_to_hf
        write(options.checkpoint, options.out, *job)

    return run_tool(lambda: _on_one_rank(convert))


def _on_one_rank(work: Callable[..., None]) -> None:
    """Call ``work(groups, kernels, device)`` in a process group of one rank."""
    # work may import megatron only after prepare_process has patched torch
    import torch.distributed as dist

    from megatron_gkd.platform.device import prepare_process

    platform = prepare_process()
    from megatron_gkd.parallel.groups import init_single_process, init_student_groups
    from megatron_gkd.platform.kernels import detect_kernels

    init_single_process(platform.collective_backend)
    try:
        # one rank suffices: dist_checkpointing reshards when a checkpoint is loaded
        groups = init_student_groups(1, 1, seed=0)
        work(groups, detect_kernels(on_cpu=platform.is_cpu), platform.device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main_hf_to_megatron())
