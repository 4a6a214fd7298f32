"""Logging configuration of one rank. Imports no torch, so that ``--check`` can log without it."""

from __future__ import annotations

import logging
from pathlib import Path

PACKAGE = "megatron_gkd"
_OWN = "megatron_gkd_handler"  # handler name, so that a second call replaces the handlers of the first


def configure_logging(level: str, rank: int, log_file: Path | None = None) -> None:
    """Log to stderr and optionally to a file; calling it again replaces the handlers.

    stderr gets ``level`` on rank 0 and warnings on other ranks. Other libraries log warnings only.

    Args:
        level: ``debug``, ``info`` or ``warning``.
        rank: This process's rank in the job.
        log_file: This rank's file, which gets ``level`` on every rank. It is appended to; its folder is created.

    Raises:
        ValueError: Unknown level.
    """
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
    if level not in levels:
        raise ValueError(f"logging.level is {level!r}; choose one of {', '.join(levels)}")
    # on the root logger, so that warnings of Megatron and SGLang get the rank, too
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _OWN]:
        root.removeHandler(handler)
        handler.close()
    screen = logging.StreamHandler()
    screen.setLevel(levels[level] if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [screen]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        # appends, so that a resumed run continues its log
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    formatter = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    for handler in handlers:
        handler.set_name(_OWN)
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(levels[level])
