"""Checkpoint retention: the newest ones and the best by a metric. Runs on one rank."""

import logging
import math
import shutil
from pathlib import Path

from megatron_gkd.checkpoint.integrity import MANIFEST, CheckpointError, read_manifest
from megatron_gkd.config.resume import finished_checkpoints

log = logging.getLogger(__name__)

BEST = "best"  # symbolic link to the best checkpoint
UNFINISHED = ".tmp"  # suffix of a folder that is being written or removed; never selected
SUPERSEDED = "superseded"  # folder for checkpoints that a run did not continue from; never read


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that have a manifest. File contents are not verified."""
    return [checkpoint for checkpoint in finished_checkpoints(folder) if (checkpoint / MANIFEST).is_file()]


def find_best(folder: Path, metric: str) -> Path | None:
    """Return the checkpoint with the lowest finite ``metric``; the newest one on a tie."""
    best, lowest = None, math.inf
    for checkpoint in complete_checkpoints(folder):
        try:
            value = read_manifest(checkpoint).get("metrics", {}).get(metric)
        except CheckpointError as error:
            # A damaged manifest must not end the run in the middle of a save.
            log.warning("This checkpoint cannot be the best: %s", error)
            continue
        if value is not None and math.isfinite(value) and value <= lowest:
            best, lowest = checkpoint, value
    return best


def set_aside_after(folder: Path, iteration: int) -> None:
    """Move the checkpoints of later iterations to ``superseded/``."""
    # Left in place, they would count as the newest: retention would remove the checkpoints that this run writes, and the
    # next resume would continue from the old ones.
    later = [p for p in finished_checkpoints(folder) if int(p.name.removeprefix("iter_")) > iteration]
    for checkpoint in later:
        target = _free_name(folder / SUPERSEDED / checkpoint.name)
        target.parent.mkdir(exist_ok=True)
        checkpoint.rename(target)
        log.warning(
            "Training continues from iteration %d: moved %s to %s; delete it if you do not need it",
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
    """Point the link at ``best``, atomically."""
    link = best.parent / BEST
    # A link cannot be changed in place; rename replaces it in one step.
    aside = link.with_name(BEST + UNFINISHED)
    aside.unlink(missing_ok=True)
    aside.symlink_to(best.name)
    aside.replace(link)


def remove_superseded(folder: Path, *, keep_last: int, best: Path | None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and ``best``, and unfinished folders.

    Args:
        folder: Folder of the checkpoints.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        best: Kept in addition.
    """
    superseded = complete_checkpoints(folder)[:-keep_last] if keep_last else []
    for checkpoint in superseded:
        if checkpoint != best:
            # Renamed first: a checkpoint that is being deleted must not be selected by a resume.
            checkpoint.rename(checkpoint.with_name(checkpoint.name + UNFINISHED))
            log.info("Removing checkpoint %s", checkpoint)
    for unfinished in folder.glob(f"iter_*{UNFINISHED}"):
        shutil.rmtree(unfinished)
