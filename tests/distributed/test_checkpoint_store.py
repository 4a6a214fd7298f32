"""A run that stops and resumes goes on as if it had not, and a checkpoint that is not whole is never chosen.

Not here: saving from a torchrun job with Megatron's own queue (end-to-end tests), the format of manifests
(tests/unit/checkpoint/test_integrity).
"""

import json
import logging
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.on_ranks import CPU, DP, PP2, PP2_VPP2, TP2, TP2_PP2, Split, allow_saving, student_groups
from tests.support.run_config import write_config
from tests.support.run_parts import (
    build_parts,
    copy_of,
    leave,
    make_batch,
    make_batches,
    make_world,
    update,
)
from tests.support.tiny_models import FOUR_LAYERS, write_tiny_model

OPTIM = {"lr": 2e-3, "decay_style": "cosine", "warmup_iters": 2, "weight_decay": 0.1}
OPTIMIZERS = {"plain": OPTIM, "distributed": OPTIM | {"use_distributed_optimizer": True}}
CHANGED = {
    "lr": 7e-3,
    "min_lr": 1e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.98,
    "adam_eps": 1e-7,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("store")
    student = write_tiny_model(folder / "student", seed=1, tied=True, **FOUR_LAYERS)
    return student, write_tiny_model(folder / "teacher", seed=2, tied=False, **FOUR_LAYERS)


@pytest.mark.parametrize(
    ("num_ranks", "split", "optim", "precision"),
    [
        (2, DP, "distributed", "fp32"),
        (4, TP2_PP2, "plain", "fp32"),
        (4, TP2_PP2, "plain", "bf16"),
        (4, TP2, "distributed", "bf16"),
    ],
    ids=str,
)
def test_resuming_is_bit_equal_to_not_stopping(
    run_on_ranks, models, tmp_path, num_ranks, split: Split, optim: str, precision: str
):
    config = write_config(
        tmp_path, *models, split=split, optim=OPTIMIZERS[optim], train={"precision": precision}
    )
    run_on_ranks(num_ranks, _stop_and_resume, config)


@pytest.mark.parametrize(
    ("optim", "saved_by", "resumed_by"),
    [
        ("plain", (2, TP2), (2, PP2)),
        ("plain", (2, DP), (4, TP2)),
        ("plain", (4, TP2_PP2), (2, DP)),
        ("distributed", (2, DP), (4, TP2_PP2)),
        ("distributed", (4, TP2), (4, PP2)),
        ("distributed", (4, PP2), (2, DP)),
        ("plain", (2, PP2_VPP2), (2, TP2)),
        ("distributed", (4, PP2), (4, PP2_VPP2)),
    ],
    ids=str,
)
def test_a_checkpoint_resumes_in_another_layout_on_another_number_of_ranks(
    run_on_ranks, models, tmp_path, optim: str, saved_by: tuple[int, Split], resumed_by: tuple[int, Split]
):
    sections = {"optim": OPTIMIZERS[optim], "gkd": {"lmbda": 0.0}}
    for (num_ranks, split), work in ((saved_by, _save_then_continue), (resumed_by, _resume_elsewhere)):
        run_on_ranks(num_ranks, work, write_config(tmp_path, *models, split=split, **sections))


def test_both_optimizers_save_equal_moments_that_another_layout_loads_bit_equal(
    run_on_ranks, models, tmp_path
):
    for name, optim in OPTIMIZERS.items():
        sections = {"optim": optim, "gkd": {"lmbda": 0.0}, "train": {"precision": "bf16"}}
        saved = write_config(tmp_path / name, *models, split=PP2, **sections)
        run_on_ranks(4, _save_then_continue, saved)
        run_on_ranks(2, _save_again, write_config(tmp_path / name, *models, split=TP2, **sections))
    run_on_ranks(1, _expect_same_moments, tmp_path / "plain", tmp_path / "distributed")


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_run_whose_updates_were_all_skipped_is_saved_and_resumed(run_on_ranks, models, tmp_path, optim):
    config = write_config(tmp_path, *models, split=DP, optim=OPTIMIZERS[optim])
    run_on_ranks(2, _save_without_a_step, config)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizer_settings_come_from_the_configuration_not_from_the_checkpoint(
    run_on_ranks, models, tmp_path, optim
):
    config = write_config(tmp_path, *models, split=DP, optim=OPTIMIZERS[optim])
    changed = write_config(tmp_path / "changed", *models, split=DP, optim=OPTIMIZERS[optim] | CHANGED)
    run_on_ranks(2, _resume_with_other_settings, config, changed)


def test_a_run_keeps_the_newest_and_the_best_checkpoint(run_on_ranks, models, tmp_path):
    run_on_ranks(2, _save_often, write_config(tmp_path, *models, split=TP2, optim=OPTIM))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best", "iter_0000002", "iter_0000005"]
    assert (folder / "best").resolve().name == "iter_0000002"


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_save_in_the_background_holds_what_a_save_in_the_foreground_does(
    run_on_ranks, models, tmp_path, optim
):
    run_on_ranks(2, _save_both_ways, write_config(tmp_path, *models, split=DP, optim=OPTIMIZERS[optim]))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_without_space_nothing_is_written_and_older_checkpoints_stay(run_on_ranks, models, tmp_path, optim):
    config = write_config(tmp_path, *models, split=DP, optim=OPTIMIZERS[optim])
    run_on_ranks(2, _save_without_space, config)


def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(run_on_ranks, models, tmp_path):
    run_on_ranks(2, _save_then_continue, write_config(tmp_path, *models, split=TP2, optim=OPTIM))
    folder = tmp_path / "run" / "checkpoints"
    good = folder / "iter_0000002"
    names = {
        3: "unfinished",
        4: "truncated",
        5: "flipped",
        6: "without manifest",
        7: "no json",
        8: "without a file",
    }
    for iteration in names:
        shutil.copytree(good, folder / f"iter_{iteration:07d}")
    (folder / "iter_0000003").rename(folder / "iter_0000003.tmp")
    _change(next((folder / "iter_0000004/weights").glob("*.distcp")), lambda data: data[:-1])
    _change(
        next((folder / "iter_0000005/weights").glob("*.distcp")),
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    )
    (folder / "iter_0000006/manifest.json").unlink()
    _change(folder / "iter_0000007/manifest.json", lambda data: data[: len(data) // 2])
    (folder / "iter_0000008/state.json").unlink()
    run_on_ranks(2, _expect_newest, folder, good, ["0000004", "0000005", "0000006", "0000007", "0000008"])
    shutil.rmtree(good)
    run_on_ranks(2, _expect_all_damaged, folder)
    run_on_ranks(2, _expect_newest, tmp_path / "nothing", None, [])


def _stop_and_resume(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    world, batches = make_world(rank, world_size), make_batches(4)
    parts = build_parts(config, world)
    student = parts.student
    store = _store(config, student)
    for i in (0, 1):
        update(parts, batches[i], i, config)
    state = {"train": {"iteration": 2}, "text": "\u00e9"}
    saved = store.save(2, student.model, student.optimizer, state)
    assert saved.name == "iter_0000002"
    store.save(2, student.model, student.optimizer, state)  # once more over the same name
    assert [p.name for p in saved.parent.iterdir()] == ["iter_0000002"]
    unbroken = [update(parts, batches[i], i, config) for i in (2, 3)]
    expected = copy_of(student.model)
    leave()

    parts = build_parts(config, world)
    student = parts.student
    update(parts, batches[0], 0, config)  # whatever was there before is replaced
    store = _store(config, student)
    found = store.find_newest_valid()
    assert found == saved
    torch.manual_seed(rank)
    assert store.load(found, student.model, student.optimizer) == state
    resumed = [update(parts, batches[i], i, config) for i in (2, 3)]
    assert resumed == unbroken
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    leave()


def _save_then_continue(rank: int, world_size: int, config_file: Path) -> None:
    """Two updates, a checkpoint, and the losses of three more."""
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    parts = build_parts(config, make_world(rank, world_size))
    student = parts.student
    progress, record = Progress(config), []
    for i in range(5):
        batch = progress.next_batch()
        loss = update(parts, batch, i, config)[1]
        record.append({"rows": [sample.row for sample in batch.samples], "loss": loss})
        if i == 1:
            _store(config, student).save(2, student.model, student.optimizer, progress.to_json())
    if rank == 0:
        (config_file.parent / "record.json").write_text(json.dumps(record))
    leave()


def _resume_elsewhere(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    config = load_config(config_file)
    expected = json.loads((config_file.parent / "record.json").read_text())
    parts = build_parts(config, make_world(rank, world_size))
    student = parts.student
    store, progress = _store(config, student), Progress(config)
    progress.restore(store.load(store.find_newest_valid(), student.model, student.optimizer))
    _expect_steps(student, 2)
    for i in (2, 3, 4):
        batch = progress.next_batch()
        assert [sample.row for sample in batch.samples] == expected[i]["rows"]
        loss = update(parts, batch, i, config)[1]
        assert loss == pytest.approx(expected[i]["loss"], rel=1e-6), f"iteration {i}"
        _expect_steps(student, i + 1)
    leave()


def _save_again(rank: int, world_size: int, config_file: Path) -> None:
    """Load in this layout, save, and compare all tensors of the two checkpoints."""
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    student, _, _ = build_parts(config, make_world(rank, world_size))
    first = _store(config, student).find_newest_valid()
    _store(config, student).load(first, student.model, student.optimizer)
    second = _store(config, student, "again").save(2, student.model, student.optimizer, {})
    expected, got = _tensors(first), _tensors(second)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        num_rows = min(len(tensor), len(got[name]))  # padding of the vocabulary differs
        assert torch.equal(tensor[:num_rows], got[name][:num_rows]), name
        assert not tensor[num_rows:].any(), name
        assert not got[name][num_rows:].any(), name
    leave()


def _expect_same_moments(rank: int, world_size: int, plain: Path, distributed: Path) -> None:
    expected, got = (_tensors(folder / "run/checkpoints/iter_0000002") for folder in (plain, distributed))
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = [name for name in expected if name.startswith(f"optimizer.state.{kind}.")]
        assert len(moments) > 10
        for name in moments:
            assert expected[name].any(), name
            difference = (got[name] - expected[name]).abs().max()
            assert difference < 0.05 * expected[name].abs().max(), name  # bf16 rounds sums in another order


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint but the random state."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    loaded = load_plain_tensors(
        str(folder / "weights")
    )  # with settings of the optimizer, which are no tensors
    return {
        name: value
        for name, value in loaded.items()
        if torch.is_tensor(value) and not name.startswith("rng_state")
    }


def _save_without_a_step(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    world, batch = make_world(rank, world_size), make_batch(0)
    parts = build_parts(config, world)
    student = parts.student
    saved = _store(config, student).save(1, student.model, student.optimizer, {})
    expected = update(parts, batch, 1, config)[1]
    weights = copy_of(student.model)
    leave()
    parts = build_parts(config, world)
    student = parts.student
    _store(config, student).load(saved, student.model, student.optimizer)
    assert update(parts, batch, 1, config)[1] == expected
    assert all(torch.equal(p, weights[name]) for name, p in student.model.named_parameters())
    leave()


def _resume_with_other_settings(rank: int, world_size: int, config_file: Path, changed_file: Path) -> None:
    from megatron_gkd.config import load_config

    allow_saving()
    config, changed = load_config(config_file), load_config(changed_file)
    world, batch = make_world(rank, world_size), make_batch(0)
    parts = build_parts(config, world)
    student = parts.student
    update(parts, batch, 0, config)
    saved = _store(config, student).save(1, student.model, student.optimizer, {})
    leave()
    parts = build_parts(changed, world)
    student = parts.student
    before = [_settings(group) for group in student.optimizer.param_groups]
    _store(config, student).load(saved, student.model, student.optimizer)
    assert [_settings(group) for group in student.optimizer.param_groups] == before
    assert before[0] | {"betas": (0.8, 0.98), "eps": 1e-7} == before[0]
    assert student.schedule.set_iteration(1) == CHANGED["lr"]
    _expect_steps(student, 1)
    leave()


def _settings(group) -> dict:
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _expect_steps(student, number: int) -> None:
    """Every parameter counts its steps for itself: a shared tensor would be counted up once per parameter."""
    states = [
        state for part in student.optimizer.chained_optimizers for state in part.optimizer.state.values()
    ]
    steps = [state["step"] for state in states]
    assert {step.item() for step in steps} == {number}
    assert len({step.data_ptr() for step in steps}) == len(steps)


class Progress:
    """Loader and counters of a run that takes all completions from data."""

    def __init__(self, config):
        from megatron_gkd.train.lifecycle import TrainState
        from megatron_gkd.train.setup import build_prompts, build_tokenizer

        self.config, self.state = config, TrainState()
        self.loader = build_prompts(config, build_tokenizer(config))

    def next_batch(self):
        from megatron_gkd.rollout.mixing import collect_batch

        engine: Any = None  # nothing is generated
        batch = collect_batch(
            self.loader,
            engine,
            iteration=self.state.iteration,
            consumed_samples=self.state.consumed_samples,
            global_batch_size=8,
            num_samples=1,
            lmbda=0.0,
            seed=self.config.train.seed,
        )
        self.state.iteration += 1
        self.state.consumed_samples += len(batch.samples)
        return batch

    def to_json(self) -> dict[str, Any]:
        return {"train": self.state.to_json(), "loader": self.loader.state_dict()}

    def restore(self, stored: dict[str, Any]) -> None:
        self.state = type(self.state).from_json(stored["train"])
        self.loader.load_state_dict(stored["loader"])


def _save_often(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    student, _, _ = build_parts(config, make_world(rank, world_size))
    store = _store(config, student, keep_last=1, best_metric="loss")
    for iteration, loss in enumerate((0.5, 0.25, math.nan, 0.75, 0.5), start=1):
        store.save(iteration, student.model, student.optimizer, {}, {"loss": loss, "lr": 0.0})
    assert store.find_newest_valid().name == "iter_0000005"
    leave()


def _save_both_ways(rank: int, world_size: int, config_file: Path) -> None:
    """Training goes on between the start of the save in the background and its end."""
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    world, batches = make_world(rank, world_size), make_batches(4)
    parts = build_parts(config, world)
    student = parts.student
    for i in (0, 1):
        update(parts, batches[i], i, config)
    foreground = _store(config, student).save(2, student.model, student.optimizer, {"a": 1})

    allow_saving(in_background=True)
    store = _store(config, student, "background", in_background=True)
    expected = store.save(2, student.model, student.optimizer, {"a": 1})
    assert [p.name for p in expected.parent.iterdir()] == ["iter_0000002.tmp"]
    update(parts, batches[2], 2, config)
    store.save(3, student.model, student.optimizer, {"a": 2})  # finishes the one before
    update(parts, batches[3], 3, config)
    assert store.find_newest_valid() == expected
    store.finish()
    store.finish()  # nothing is left to do
    newest = store.find_newest_valid()
    assert newest.name == "iter_0000003"

    saved, background = _tensors(foreground), _tensors(expected)
    assert background.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(background[name], tensor), name
    later = _tensors(newest)
    assert any(not torch.equal(later[name], tensor) for name, tensor in saved.items())
    assert (expected / "state.json").read_text() == (foreground / "state.json").read_text()

    store.save(4, student.model, student.optimizer, {})
    deadline = time.monotonic() + 60
    while not (newest.parent / "iter_0000004").exists():
        assert time.monotonic() < deadline
        store.advance()
    leave()


def _save_without_space(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.checkpoint import saving
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    student, _, _ = build_parts(config, make_world(rank, world_size))
    store = _store(config, student)
    saved = store.save(1, student.model, student.optimizer, {})
    copies = 4 if config.optim.use_distributed_optimizer else 3  # weights, two moments, main weights
    size = saving._SMALL_FILES + student.shapes.num_parameters * 4 * copies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda folder: SimpleNamespace(free=size - 1))
        with pytest.raises(saving.NoSpaceError, match="GiB left; free some space or lower"):
            store.save(2, student.model, student.optimizer, {})
        assert [p.name for p in saved.parent.iterdir()] == [saved.name]
        assert store.find_newest_valid() == saved
        random_state = 100_000
        patch.setattr(saving.shutil, "disk_usage", lambda folder: SimpleNamespace(free=size + random_state))
        assert store.save(2, student.model, student.optimizer, {}) == store.find_newest_valid()
    leave()


def _expect_newest(
    rank: int, world_size: int, folder: Path, expected: Path | None, warned: list[str]
) -> None:
    from megatron_gkd.checkpoint.store import CheckpointStore

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("megatron_gkd.checkpoint.store")
    logger.addHandler(handler)
    with student_groups(TP2) as groups:
        store = CheckpointStore(folder, hf_files=folder, groups=groups, dtype=torch.float32, device=CPU)
        assert store.find_newest_valid() == expected
    logger.removeHandler(handler)
    messages = [record.getMessage() for record in records]
    for name in warned:
        assert sum(f"Skipping checkpoint iter_{name}: " in text for text in messages) == 1, messages


def _expect_all_damaged(rank: int, world_size: int, folder: Path) -> None:
    from megatron_gkd.checkpoint.integrity import CheckpointError
    from megatron_gkd.checkpoint.store import CheckpointStore

    with student_groups(TP2) as groups:
        store = CheckpointStore(folder, hf_files=folder, groups=groups, dtype=torch.float32, device=CPU)
        with pytest.raises(
            CheckpointError, match=r"none of the 5 .* is intact \(iter_0000008: .*checkpoint\.resume=false"
        ):
            store.find_newest_valid()


def _store(config, student, name: str = "checkpoints", **options):
    from megatron_gkd.checkpoint.store import CheckpointStore

    return CheckpointStore(
        config.train.output_dir / name,
        hf_files=config.student.hf_folder,
        groups=student.groups,
        dtype=student.dtype,
        device=CPU,
        **options,
    )


def _change(file: Path, how) -> None:
    file.write_bytes(how(file.read_bytes()))
