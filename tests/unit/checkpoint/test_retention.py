"""Which checkpoint folders stay; that a run applies it: tests/distributed/test_checkpoint_store.py."""

import json
from pathlib import Path

import pytest

from megatron_gkd.checkpoint.retention import (
    complete_checkpoints,
    find_best,
    link_best,
    remove_superseded,
    set_aside_after,
)


def write(folder: Path, iteration: int, loss: float | None = None) -> Path:
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    metrics = {} if loss is None else {"loss": loss}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {}, "metrics": metrics}))
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, [1, 2, 3, 10]), (1, [10]), (2, [3, 10]), (9, [1, 2, 3, 10])]
)
def test_the_newest_stay(tmp_path, keep_last, kept):
    for iteration in (10, 1, 2, 3):
        write(tmp_path, iteration)
    remove_superseded(tmp_path, keep_last=keep_last, best=None)
    assert names(tmp_path) == [f"iter_{n:07d}" for n in kept]


def test_the_best_stays_beside_the_newest(tmp_path):
    losses = {1: 0.5, 2: 0.25, 3: 0.75, 4: None, 5: 0.5}
    checkpoints = {n: write(tmp_path, n, loss) for n, loss in losses.items()}
    best = find_best(tmp_path, "loss")
    assert best == checkpoints[2]
    remove_superseded(tmp_path, keep_last=1, best=best)
    assert complete_checkpoints(tmp_path) == [checkpoints[2], checkpoints[5]]
    assert find_best(tmp_path, "validation/loss") is None


def test_of_equally_good_ones_the_newest_is_the_best(tmp_path):
    write(tmp_path, 1, 0.5)
    newest = write(tmp_path, 2, 0.5)
    assert find_best(tmp_path, "loss") == newest


def test_a_manifest_that_cannot_be_read_is_not_the_best(tmp_path):
    best = write(tmp_path, 1, 0.5)
    (write(tmp_path, 2, 0.25) / "manifest.json").write_text("{")
    assert find_best(tmp_path, "loss") == best


def test_later_checkpoints_make_room_for_those_of_the_run_that_goes_on_without_them(tmp_path):
    for iteration in (50, 60, 100):
        write(tmp_path, iteration)
    link_best(tmp_path / "iter_0000100")
    set_aside_after(tmp_path, 50)
    assert names(tmp_path) == ["iter_0000050", "superseded"]
    write(tmp_path, 60)
    remove_superseded(tmp_path, keep_last=1, best=None)
    assert complete_checkpoints(tmp_path) == [tmp_path / "iter_0000060"]
    for _ in range(2):
        write(tmp_path, 100)
        set_aside_after(tmp_path, 60)
    kept = ["iter_0000060", "iter_0000100", "iter_0000100.2", "iter_0000100.3"]
    assert names(tmp_path / "superseded") == kept, "nothing is lost"


def test_a_run_that_starts_anew_leaves_no_old_checkpoint_in_its_way(tmp_path):
    write(tmp_path, 7)
    for name in ("iter_0000008.tmp", "iter_0000006.mine"):
        (tmp_path / name).mkdir()
    set_aside_after(tmp_path, 0)
    assert names(tmp_path) == ["iter_0000006.mine", "iter_0000008.tmp", "superseded"]


def test_the_link_follows_the_best(tmp_path):
    for n in (1, 2):
        link_best(write(tmp_path, n))
        assert (tmp_path / "best").resolve().name == f"iter_{n:07d}"
    assert (tmp_path / "best").readlink() == Path("iter_0000002"), (
        "an absolute link breaks when the run is moved"
    )


def test_what_a_killed_save_left_is_removed_and_never_counted(tmp_path):
    write(tmp_path, 3).rename(tmp_path / "iter_0000003.tmp")
    (tmp_path / "iter_0000002").mkdir()  # without manifest: not ours to judge
    write(tmp_path, 1)
    remove_superseded(tmp_path, keep_last=1, best=None)
    assert names(tmp_path) == ["iter_0000001", "iter_0000002"]
