"""A run that stops and resumes goes on as if it had not, and a checkpoint that is not whole is never chosen.

Not here: saving from a torchrun job with Megatron's own queue (end-to-end tests), the format of manifests
(tests/unit/checkpoint/test_integrity).
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, Split, allow_saving, student_groups
from tests.support.run_config import build_parts, copy_of, leave, make_batch, make_world, update, write_config
from tests.support.tiny_models import write_tiny_model

SMALL = {"hidden_size": 32, "num_layers": 2, "ffn": 64}
LENGTHS = ((4, 5), (2, 9), (6, 0), (3, 0), (5, 1), (9, 12), (1, 3), (7, 4))
OPTIM = {"lr": 2e-3, "decay_style": "cosine", "warmup_iters": 2, "weight_decay": 0.1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("store")
    student = write_tiny_model(folder / "student", seed=1, tied=True, **SMALL)
    return student, write_tiny_model(folder / "teacher", seed=2, tied=False, **SMALL)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2), (2, PP2), (2, DP), (4, TP2_PP2)], ids=str)
def test_resuming_is_bit_equal_to_not_stopping(
    run_on_ranks, models, tmp_path, num_ranks, split: Split, precision: str
):
    config = write_config(tmp_path, *models, split=split, optim=OPTIM, train={"precision": precision})
    run_on_ranks(num_ranks, _stop_and_resume, config)


@pytest.mark.parametrize(
    ("num_ranks", "saved_by", "resumed_by"),
    [(2, TP2, PP2), (2, PP2, TP2), (2, DP, TP2), (2, TP2, DP), (4, TP2_PP2, DP), (4, DP, TP2_PP2)],
    ids=str,
)
def test_a_checkpoint_resumes_in_another_layout(
    run_on_ranks, models, tmp_path, num_ranks, saved_by, resumed_by
):
    files = [write_config(tmp_path, *models, split=split, optim=OPTIM) for split in (saved_by, resumed_by)]
    run_on_ranks(num_ranks, _save_then_continue, files[0])
    run_on_ranks(num_ranks, _resume_elsewhere, files[1])


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
    run_on_ranks(2, _expect_newest, folder, None, ["0000004"])
    run_on_ranks(2, _expect_newest, tmp_path / "nothing", None, [])


def _stop_and_resume(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    world, batches = make_world(rank, world_size), [make_batch(seed, LENGTHS) for seed in range(4)]
    student, teacher, head_VH = build_parts(config, world)
    store = _store(config, student)
    for i in (0, 1):
        update(student, teacher, head_VH, batches[i], i, config)
    state = {"train": {"iteration": 2}, "text": "\u00e9"}
    saved = store.save(2, student.model, student.optimizer, state)
    assert saved.name == "iter_0000002"
    store.save(2, student.model, student.optimizer, state)  # once more over the same name
    assert [p.name for p in saved.parent.iterdir()] == ["iter_0000002"]
    unbroken = [update(student, teacher, head_VH, batches[i], i, config) for i in (2, 3)]
    expected = copy_of(student.model)
    leave()

    student, teacher, head_VH = build_parts(config, world)
    update(student, teacher, head_VH, batches[0], 0, config)  # whatever was there before is replaced
    store = _store(config, student)
    found = store.find_newest_valid()
    assert found == saved
    torch.manual_seed(rank)
    assert store.load(found, student.model, student.optimizer) == state
    resumed = [update(student, teacher, head_VH, batches[i], i, config) for i in (2, 3)]
    assert resumed == unbroken
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    leave()


def _save_then_continue(rank: int, world_size: int, config_file: Path) -> None:
    """Two updates, a checkpoint, and the losses of three more."""
    from megatron_gkd.config import load_config

    allow_saving()
    config = load_config(config_file)
    student, teacher, head_VH = build_parts(config, make_world(rank, world_size))
    losses = []
    for i in range(5):
        losses.append(update(student, teacher, head_VH, make_batch(i, LENGTHS), i, config)[1])
        if i == 1:
            _store(config, student).save(2, student.model, student.optimizer, {})
    if rank == 0:
        (config_file.parent / "losses.json").write_text(json.dumps(losses))
    leave()


def _resume_elsewhere(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    config = load_config(config_file)
    expected = json.loads((config_file.parent / "losses.json").read_text())
    student, teacher, head_VH = build_parts(config, make_world(rank, world_size))
    store = _store(config, student)
    store.load(store.find_newest_valid(), student.model, student.optimizer)
    losses = [update(student, teacher, head_VH, make_batch(i, LENGTHS), i, config)[1] for i in (2, 3, 4)]
    assert losses == pytest.approx(expected[2:], rel=1e-6)
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
        assert sum(f"Passing over checkpoint iter_{name}: " in text for text in messages) == 1, messages


def _store(config, student):
    from megatron_gkd.checkpoint.store import CheckpointStore

    return CheckpointStore(
        config.train.output_dir / "checkpoints",
        hf_files=config.student.hf_folder,
        groups=student.groups,
        dtype=student.dtype,
        device=CPU,
    )


def _change(file: Path, how) -> None:
    file.write_bytes(how(file.read_bytes()))
