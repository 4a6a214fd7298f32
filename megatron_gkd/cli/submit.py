"""Submit a SLURM job that runs a copy of the code, so that later edits do not reach it.

    python launch/submit.py [SBATCH OPTION...] JOB.sbatch --config FILE [--config FILE...] [section.key=value...]

JOB.sbatch is one of launch/slurm, or your own. The code and the resolved configuration go to <train.output_dir>/code/<time>,
the job's output to <train.output_dir>/logs. Options of sbatch come before the file and win over its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_gkd.cli.outcome import run_tool
from megatron_gkd.cli.pretrain import add_config_arguments
from megatron_gkd.cli.snapshot import copy_code
from megatron_gkd.config import GkdConfig, load_config

CODE_VARIABLE = "MEGATRON_GKD_CODE"
CONFIG_FILE = "submitted.yaml"
ENTRY_POINT = Path("launch", "pretrain_gkd.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the configuration, copy the code, call sbatch; 0 if the job was taken, 2 if something was refused."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(__doc__ or "")
        return 0
    return run_tool(lambda: _submit(words))


def _submit(words: list[str]) -> None:
    sbatch_options, script, options = _split(words)
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not found here; submit on a login node of the cluster")
    config = load_config(options.config, options.overrides)
    code = _store_code(config)
    logs = config.train.output_dir.absolute() / "logs"
    logs.mkdir(exist_ok=True)
    command = [
        "sbatch",
        f"--output={logs}/slurm_%j.log",
        *sbatch_options,
        script,
        "--config",
        str(code / CONFIG_FILE),
    ]
    result = subprocess.run(
        command, env={**os.environ, CODE_VARIABLE: str(code)}, capture_output=True, text=True
    )
    if result.returncode:
        shutil.rmtree(code)
        raise ValueError(f"sbatch did not take the job: {result.stderr.strip()}")
    sys.stdout.write(f"{result.stdout}code: {code}\nlogs: {logs}\n")


def _split(words: list[str]) -> tuple[list[str], str, argparse.Namespace]:
    """(options of sbatch, job file, arguments of the training command)."""
    position = next((i for i, word in enumerate(words) if word.endswith(".sbatch")), None)
    if position is None:
        raise ValueError("no job file is given; name one of launch/slurm/*.sbatch before --config")
    script = words[position]
    if not Path(script).is_file():
        raise ValueError(f"the job file {script} does not exist")
    parser = argparse.ArgumentParser(prog=f"submit.py ... {script}")
    add_config_arguments(parser)
    return words[:position], script, parser.parse_args(words[position + 1 :])


def _store_code(config: GkdConfig) -> Path:
    """The new folder with the copy and the resolved configuration."""
    source = config.runtime.working_dir
    if not (source / ENTRY_POINT).is_file():
        raise ValueError(
            f"runtime.working_dir={str(source)!r} has no {ENTRY_POINT}; submit from the folder of the code or name it"
        )
    folder = config.train.output_dir.absolute() / "code"
    folder.mkdir(parents=True, exist_ok=True)
    code = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d_%H%M%S_"), dir=folder))
    copy_code(source, code, excludes=config.runtime.excludes, output_dir=config.train.output_dir)
    (code / CONFIG_FILE).write_text(config.to_yaml())
    return code
