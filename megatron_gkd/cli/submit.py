"""Submit a SLURM job that runs a snapshot of the code.

    python launch/submit.py [SBATCH OPTION...] JOB.sbatch --config FILE [--config FILE...] [section.key=value...]

Later edits do not affect the job. JOB.sbatch is a file of launch/slurm or your own. The code and the resolved configuration
are copied to <train.output_dir>/code/<time>; the job's output goes to <train.output_dir>/logs. Options of sbatch come before
the file and take precedence over the #SBATCH lines in it.
"""

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from megatron_gkd.cli import run_tool
from megatron_gkd.cli.pretrain import add_config_arguments
from megatron_gkd.config import GkdConfig, load_config

CODE_VARIABLE = "MEGATRON_GKD_CODE"
CONFIG_FILE = "submitted.yaml"
ENTRY_POINT = Path("launch", "pretrain_gkd.py")
MAX_BYTES = 256 * 2**20
NUM_SHOWN = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Check the configuration, copy the code and call sbatch; return the exit code."""
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
    logs.mkdir(
        exist_ok=True
    )  # SLURM does not create the folder of --output; the job would fail without a message
    command = [
        "sbatch",
        f"--output={logs}/slurm_%j.log",
        *sbatch_options,
        script,
        "--config",
        str(code / CONFIG_FILE),
    ]
    # the job inherits the variable (sbatch --export=ALL is the default); job.sh runs the code in this folder
    result = subprocess.run(
        command, env={**os.environ, CODE_VARIABLE: str(code)}, capture_output=True, text=True
    )
    if result.returncode:
        shutil.rmtree(code)
        raise ValueError(f"sbatch did not take the job: {result.stderr.strip()}")
    sys.stdout.write(f"{result.stdout}code: {code}\nlogs: {logs}\n")


def _split(words: list[str]) -> tuple[list[str], str, argparse.Namespace]:
    """Split into options of sbatch, the job file, and the arguments of the training command."""
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
    """Create the folder with the copy of the code and the resolved configuration."""
    source = config.runtime.working_dir
    if not (source / ENTRY_POINT).is_file():
        raise ValueError(
            f"runtime.working_dir={str(source)!r} has no {ENTRY_POINT}; submit from the folder of the code or set the key"
        )
    folder = config.train.output_dir.absolute() / "code"
    folder.mkdir(parents=True, exist_ok=True)
    # the random suffix keeps two submissions in the same second apart
    code = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d_%H%M%S_"), dir=folder))
    copy_code(source, code, excludes=config.runtime.excludes, output_dir=config.train.output_dir)
    (code / CONFIG_FILE).write_text(config.to_yaml())
    return code


def copy_code(source: Path, target: Path, *, excludes: Sequence[str], output_dir: Path) -> int:
    """Copy ``source`` into ``target``; links to folders are kept as links.

    Args:
        source: Folder of the code.
        target: Created; may be below ``source`` if ``output_dir`` contains it.
        excludes: Patterns, see ``runtime.excludes``.
        output_dir: The run's output folder; never copied.

    Returns:
        Number of files copied.

    Raises:
        ValueError: The files exceed ``MAX_BYTES``; the message lists the largest.
    """
    files = list(_find_files(source, excludes, output_dir.resolve()))
    _check_size(files, source)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():  # a link: a virtual environment or a dataset may be behind it
            copy.symlink_to(file.resolve())
        else:
            shutil.copy2(file, copy)
    return len(files)


def is_excluded(path: PurePath, *, is_folder: bool, patterns: Sequence[str]) -> bool:
    """Whether a pattern of ``runtime.excludes`` matches ``path``, relative to the folder of the code."""
    # as in .gitignore: a trailing slash matches folders only, a leading one the root only
    for pattern in patterns:
        if pattern.endswith("/") and not is_folder:
            continue
        candidate = path.as_posix() if pattern.startswith("/") else path.name
        if fnmatch.fnmatchcase(candidate, pattern.strip("/")):
            return True
    return False


def _find_files(source: Path, patterns: Sequence[str], output_dir: Path) -> Iterator[Path]:
    """Yield files and links to folders, without entering excluded folders."""
    for parent, folders, files in os.walk(source):
        kept = []
        for name in sorted(folders):
            folder = Path(parent, name)
            if folder.resolve() == output_dir:
                continue
            if is_excluded(folder.relative_to(source), is_folder=True, patterns=patterns):
                continue
            if folder.is_symlink():
                yield folder
            kept.append(name)
        folders[:] = kept  # in place: os.walk enters what is left in the list
        for name in sorted(files):
            file = Path(parent, name)
            if file.is_file() and not is_excluded(
                file.relative_to(source), is_folder=False, patterns=patterns
            ):
                yield file


def _check_size(files: Sequence[Path], source: Path) -> None:
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:NUM_SHOWN]
    shown = ", ".join(f"{file.relative_to(source)} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
    raise ValueError(
        f"the code in {source} takes {total / 2**20:.0f} MiB, and at most {MAX_BYTES / 2**20:.0f} MiB are copied; add "
        f"files that are not code to runtime.excludes; the largest files: {shown}"
    )
