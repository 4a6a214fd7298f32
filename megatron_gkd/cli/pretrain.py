"""``torchrun launch/pretrain_gkd.py --config FILE [section.key=value ...]``: distil a student from a teacher."""

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from megatron_gkd.cli import REFUSED
from megatron_gkd.config import ConfigError, GkdConfig, check_world, load_config
from megatron_gkd.config.resume import check_resume
from megatron_gkd.models.patterns import check_patterns
from megatron_gkd.observability import Status, StatusFile
from megatron_gkd.observability.run_folder import FolderInUseError, RunLock
from megatron_gkd.platform.environment import Environment, Placeholders

log = logging.getLogger(__name__)

RANK_0_FIRST_S = 0.5
"""Delay of other ranks before they report an end, so that rank 0 reports one that all ranks share."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done or planned stop, 2 refused before training, 1 anything else."""
    options = _parse(argv)
    try:
        config = load_config(options.config, options.overrides)
        if options.show is not None:
            sys.stdout.write(_value_text(config, options.show))
            return 0
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check_world(config, options.world_size or world_size)
        check_patterns(config)
        check_resume(config)
    except ConfigError as error:
        return _refuse(str(error), None)
    if options.check:
        sys.stdout.write(f"the configuration is fine for {options.world_size or world_size} ranks\n")
        return 0
    return _dry_run(config) if options.dry_run else _train(config)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain_gkd.py",
        description="On-policy distillation of a student from a teacher. Start it with torchrun, one process per device.",
        epilog="Every key, with its default: configs/on_policy_distill_trainer.yaml",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="check the configuration and exit; needs no torch"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two updates on synthetic batches of the largest shapes; prints memory and times, writes nothing",
    )
    parser.add_argument(
        "--world-size", type=int, default=None, metavar="N", help="with --check: number of ranks to check for"
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const="",
        metavar="KEY",
        help="print a key of the resolved configuration, or all of it, and exit; needs no torch",
    )
    options = parser.parse_args(argv)
    if options.world_size is not None and not options.check:
        parser.error("--world-size goes with --check; a run takes its size from torchrun")
    return options


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``load_config`` takes."""
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="YAML file; may be given several times, later files win",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrides, e.g. loss.beta=0.1"
    )


def _value_text(config: GkdConfig, key: str) -> str:
    """The value of a key, or of a property derived from keys, as text; the whole tree for no key."""
    if not key:
        return config.to_yaml()
    value: Any = config
    for name in key.split("."):
        if not _has_key(value, name):
            raise ConfigError(f"--show {key}: there is no such key")
        value = getattr(value, name)
    if isinstance(value, BaseModel):
        raise ConfigError(f"--show {key}: is a section; name one of its keys")
    return f"{'null' if value is None else value}\n"


def _has_key(section: Any, name: str) -> bool:
    kind = type(section)
    return issubclass(kind, BaseModel) and (
        name in kind.model_fields or isinstance(getattr(kind, name, None), property)
    )


def _dry_run(config: GkdConfig) -> int:
    rank = _rank()
    environment = Environment.of(
        config.runtime.env_vars, Placeholders(config.train.output_dir, f"rank_{rank}")
    )
    environment.apply()  # without the folders that its variables name: nothing is written
    from megatron_gkd.observability.log import configure_logging

    configure_logging(config.logging.level, rank)
    environment.report()
    from megatron_gkd.platform.device import prepare_process

    try:
        platform = prepare_process()
    except ConfigError as error:
        return _refuse(str(error), None)
    from megatron_gkd.checkpoint.integrity import CheckpointError
    from megatron_gkd.data.tokenizer import DataError
    from megatron_gkd.train.dry_run import dry_run

    try:
        report = dry_run(config, platform)
    except (ConfigError, DataError, CheckpointError) as error:
        return _refuse(str(error), None)
    if rank == 0:
        sys.stdout.write(f"{report}\n")
    return 0


def _train(config: GkdConfig) -> int:
    rank = _rank()
    lock = RunLock(config.train.output_dir)  # held until this process ends
    if rank == 0:
        try:
            lock.acquire()
        except FolderInUseError as error:
            return _refuse(str(error), None)  # status.json belongs to the other run
        _note_start(config)
    placeholders = Placeholders(config.train.output_dir, f"rank_{rank}")
    environment = Environment.of(config.runtime.env_vars, placeholders)
    environment.make_folders()
    environment.apply()
    # Imported here: torch reads the environment when it is imported, --check works without torch, and the helper process
    # of dist_checkpointing imports this module again.
    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_gkd.observability.log import configure_logging
    from megatron_gkd.observability.run_folder import StopFile

    if rank == 0:  # before the models load: a stop file written meanwhile is meant for this start
        StopFile(config.train.output_dir).clear()
    configure_logging(config.logging.level, rank, Path(placeholders.fill(config.runtime.log_file)))
    environment.report()
    return record(_train_or_report)(config, rank) or 0


def _train_or_report(config: GkdConfig, rank: int) -> int:
    """Train, and record in ``status.json`` how it ended; returns the exit code."""
    from megatron_gkd.platform.device import prepare_process

    try:
        platform = prepare_process()
    except ConfigError as error:
        return _refuse(str(error), config)
    from megatron_gkd.checkpoint.integrity import CheckpointError
    from megatron_gkd.data.tokenizer import DataError
    from megatron_gkd.losses.verify.certificate import CertificateError
    from megatron_gkd.train.lifecycle import StopRequest
    from megatron_gkd.train.setup import build_trainer

    stop = StopRequest(config.train.output_dir)
    stop.listen()
    # closed after the end is noted: other ranks fail by the closed connections, and would note those as the cause
    with ExitStack() as cleanup:
        try:
            trainer = build_trainer(config, platform, cleanup)
        except (ConfigError, DataError, CheckpointError, CertificateError) as error:
            return _refuse(str(error), config)
        except BaseException as error:
            _note_end(config, "failed", 0, f"{type(error).__name__}: {error}")
            raise
        try:
            outcome = trainer.train(stop)
        except BaseException as error:
            _note_end(config, "failed", trainer.state.iteration, f"{type(error).__name__}: {error}")
            raise
    log.info("%s after iteration %d: %s", outcome, trainer.state.iteration, config.train.output_dir)
    return 0


def _refuse(message: str, config: GkdConfig | None) -> int:
    """Print the reason, and write it to ``status.json`` if a configuration is given; returns the exit code.

    All ranks usually refuse for the same reason, which rank 0 prints. A reason that another rank alone finds (a file or a
    device missing on its node) is printed by that rank; before the run has a folder, by the first rank of each node.
    """
    is_recorded = config is not None and _note_end(config, "refused", 0, message)
    if _rank() == 0:
        sys.stderr.write(f"refused: {message}\n")
        return REFUSED
    if is_recorded or (config is None and os.environ.get("LOCAL_RANK") == "0"):
        sys.stderr.write(f"refused: {_place()}: {message}\n")
    elif config is None:
        time.sleep(RANK_0_FIRST_S)  # torchrun ends rank 0 as soon as another rank has ended
    return REFUSED


def _note_start(config: GkdConfig) -> None:
    """Replace the status of an earlier start."""
    file = StatusFile(config.train.output_dir)
    before = _read_status(file)
    file.write("running", before.iteration if before else 0, "starting")


def _note_end(config: GkdConfig, state: Literal["refused", "failed"], iteration: int, reason: str) -> bool:
    """Write the final status unless another rank did; return whether this rank reports the end.

    The first rank that fails has the cause, later ones often only a lost connection. If all fail alike, rank 0 writes.
    While rank 0 does not hold the folder's lock, the files there belong to another run, and nothing is written.
    """
    if _rank() > 0:
        time.sleep(RANK_0_FIRST_S)
        reason = f"{_place()}: {reason}"
        if not RunLock(config.train.output_dir).is_of_this_launch():
            return True
    file = StatusFile(config.train.output_dir)
    status = _read_status(file)
    if status is not None and status.state != "running":
        return False
    file.write(state, iteration, reason)
    return True


def _read_status(file: StatusFile) -> Status | None:
    try:
        return file.read()
    except ValueError as error:
        log.warning("%s; it is replaced", error)
        return None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _place() -> str:
    return f"rank {_rank()} on {socket.gethostname()}"


if __name__ == "__main__":
    sys.exit(main())
