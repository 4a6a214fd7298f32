"""An update of the student is that of a plain training loop with transformers, in every layout.

Compared after five iterations with clipping, warm-up, decay, weight decay, uneven micro-batches (one without any token
of the loss), tied and untied, with a teacher of another size in another layout.

Not here: the loss by itself (tests/unit/losses), resuming (test_checkpoint_store), the loop around it (end-to-end tests).
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, TP2_PP2_SP, TP2_SP, Split, destroy_all_groups
from tests.support.run_config import make_batch, make_world, update, write_config
from tests.support.tiny_models import write_tiny_model

SMALL = {"hidden_size": 32, "num_layers": 2, "ffn": 64}
# prompt and completion lengths; samples 2 and 3 make a micro-batch of two without loss rows
LENGTHS = ((4, 5), (2, 9), (6, 0), (3, 0), (5, 1), (9, 12), (1, 3), (7, 4))
OPTIM = {
    "lr": 2e-3,
    "min_lr": 1e-4,
    "decay_style": "cosine",
    "warmup_iters": 2,
    "weight_decay": 0.1,
    "clip_grad": 0.5,
}
CASES = {
    "llama_tied_forward_kl": ({"tied": True}, {"divergence": "forward_kl"}),
    "qwen3_untied_jsd": (
        {"family": "qwen3", "tied": False},
        {"divergence": "jsd", "beta": 0.3, "temperature": 1.5, "tokens_per_chunk": 4},
    ),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Path]:
    """Per case a folder with student, teacher, loss section and what the plain loop made of them."""
    from tests.support.reference_training import Recipe, train_reference

    folders = []
    for name, (options, loss) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        student = write_tiny_model(folder / "student", seed=1, **SMALL, **options)
        teacher = write_tiny_model(folder / "teacher", seed=2, **{**SMALL, "hidden_size": 48}, tied=not options["tied"])
        (folder / "loss.json").write_text(json.dumps(loss))
        full = {"beta": 0.5, "temperature": 1.0, **loss}
        recipe = Recipe(
            full["divergence"],
            full["beta"],
            full["temperature"],
            *(OPTIM[k] for k in ("lr", "min_lr", "warmup_iters")),
            train_iters=5,
            weight_decay=OPTIM["weight_decay"],
            clip_grad=OPTIM["clip_grad"],
        )
        outcome = train_reference(student, teacher, _batches(), recipe)
        assert min(outcome.grad_norms) < OPTIM["clip_grad"] < max(outcome.grad_norms), outcome.grad_norms
        (folder / "curves.json").write_text(json.dumps([outcome.losses, outcome.grad_norms]))
        save_file({k: v.contiguous() for k, v in outcome.weights.items()}, folder / "trained.safetensors")
        folders.append(folder)
    return folders


SPLITS = [(2, TP2, PP2), (2, PP2, DP), (2, DP, TP2), (2, TP2_SP, TP2), (4, TP2_PP2, PP2), (4, TP2_PP2_SP, TP2), (4, TP2, DP)]


@pytest.mark.parametrize(("num_ranks", "split", "teacher_split"), SPLITS, ids=str)
def test_five_updates_are_those_of_a_plain_training_loop(
    run_on_ranks, cases, tmp_path, num_ranks: int, split: Split, teacher_split: Split
):
    jobs = []
    for folder in cases:
        sections = {"loss": json.loads((folder / "loss.json").read_text()), "optim": OPTIM}
        models = folder / "student", folder / "teacher"
        jobs.append(write_config(tmp_path / folder.name, *models, split=split, teacher_split=teacher_split, **sections))
    run_on_ranks(num_ranks, _train, jobs)
    for folder, job in zip(cases, jobs, strict=True):
        losses, norms = json.loads((folder / "curves.json").read_text())
        got_losses, got_norms = json.loads((job.parent / "curves.json").read_text())
        assert got_losses == pytest.approx(losses, rel=1e-5), folder.name
        assert got_norms == pytest.approx(norms, rel=1e-5), folder.name
        before, expected = load_file(folder / "student" / "model.safetensors"), load_file(folder / "trained.safetensors")
        got = load_file(job.parent / "trained.safetensors")
        assert got.keys() == expected.keys()
        for name in expected:
            moved = (expected[name] - before[name].double()).norm()
            assert moved > 0, name
            assert (got[name].double() - expected[name]).norm() <= 1e-3 * moved, f"{folder.name}: {name}"


def _batches():
    return [make_batch(seed, LENGTHS) for seed in range(5)]


def _train(rank: int, world_size: int, config_files: list[Path]) -> None:
    from megatron_gkd.checkpoint.hf import export_weights
    from megatron_gkd.config import load_config

    for file in config_files:
        config = load_config(file)
        config.check_world(world_size)
        student, teacher, head_VH = _build(config, make_world(rank, world_size))
        losses, norms = [], []
        for iteration, batch in enumerate(_batches()):
            result, loss = update(student, teacher, head_VH, batch, iteration, config)
            assert not result.is_skipped
            losses.append(loss)
            norms.append(result.grad_norm)
        if rank == 0:
            (file.parent / "curves.json").write_text(json.dumps([losses, norms]))
        export_weights(student.model, file.parent / "trained.safetensors", student.shapes, student.groups, student.dtype)
        _leave()


def _build(config, world):
    from megatron_gkd.train.build import build_student, build_teacher
    from tests.support.tiny_models import PAD_ID

    student = build_student(config, world)
    return student, *build_teacher(config, world, student, PAD_ID)


def _leave() -> None:
    from megatron_gkd.parallel.groups import destroy_student_groups

    destroy_student_groups()
    destroy_all_groups()
