"""Which checkpoints of a run stay: the newest ones, and the best by a metric. For one process; the others wait."""

import logging
import math
import shutil
from pathlib import Path

from megatron_gkd.checkpoint.integrity import MANIFEST, CheckpointError, read_manifest
from megatron_gkd.config.resume import finished_checkpoints

log = logging.getLogger(__name__)

BEST = "best"
"""Link beside the checkpoints to the best of them."""
UNFINISHED = ".tmp"
"""Ending of a folder that is being written or removed; it is never chosen."""
SUPERSEDED = "superseded"
"""Folder beside the checkpoints for those that a run did not continue; nothing reads it."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those that have a manifest; their files are not looked at."""
    return [checkpoint for checkpoint in finished_checkpoints(folder) if (checkpoint / MANIFEST).is_file()]


def find_best(folder: Path, metric: str) -> Path | None:
    """The checkpoint with the lowest finite value of ``metric``, the newest of equal ones; ``None`` if none has one."""
    best, lowest = None, math.inf
    for checkpoint in complete_checkpoints(folder):
        try:
            value = read_manifest(checkpoint).get("metrics", {}).get(metric)
        except CheckpointError as error:
            log.warning("This checkpoint cannot be the best: %s", error)
            continue
        if value is not None and math.isfinite(value) and value <= lowest:
            best, lowest = checkpoint, value
    return best


def set_aside_after(folder: Path, iteration: int) -> None:
    """Move all checkpoints of later iterations to ``superseded/``: this run goes on without them.

    Left where they are, they would be taken for the newest, by retention and by the next resume.
    """
    later = [p for p in finished_checkpoints(folder) if int(p.name.removeprefix("iter_")) > iteration]
    for checkpoint in later:
        target = _free_name(folder / SUPERSEDED / checkpoint.name)
        target.parent.mkdir(exist_ok=True)
        checkpoint.rename(target)
        log.warning(
            "Training goes on from iteration %d: moved %s to %s; remove it if you do not need it",
            iteration,
            checkpoint.name,
            target,
        )
    link = folder / BEST
    if link.is_symlink() and not link.exists():
        link.unlink()


def _free_name(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.partition('.')[0]}.{number}")
    return path


def link_best(best: Path) -> None:
    """Point the link at ``best``; a reader finds the old or the new one at any time."""
    link = best.parent / BEST
    aside = link.with_name(BEST + UNFINISHED)
    aside.unlink(missing_ok=True)
    aside.symlink_to(best.name)
    aside.replace(link)


def remove_superseded(folder: Path, *, keep_last: int, best: Path | None) -> None:
    """Remove all checkpoints but the newest ``keep_last`` (0: all stay) and ``best``, and what unfinished saves left."""
    superseded = complete_checkpoints(folder)[:-keep_last] if keep_last else []
    for checkpoint in superseded:
        if checkpoint != best:
            # from here on nobody can choose it while it is half gone
            checkpoint.rename(checkpoint.with_name(checkpoint.name + UNFINISHED))
            log.info("Removing checkpoint %s", checkpoint)
    for unfinished in folder.glob(f"iter_*{UNFINISHED}"):
        shutil.rmtree(unfinished)
