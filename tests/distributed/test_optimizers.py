"""SGD and chosen weight decay update like torch's optimizers in a plain loop, and resume bit for bit.

AdamW with the default groups: test_student_step; the values of the schedules: tests/unit/optim.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.on_ranks import PP2, TP2, TP2_PP2, Split
from tests.support.run_config import write_config
from tests.support.run_parts import (
    build_parts,
    check_resume,
    leave,
    make_batches,
    make_world,
    update,
)
from tests.support.tiny_models import SMALL, write_tiny_model

OPTIM = {
    "optimizer": "sgd",
    "lr": 0.05,
    "min_lr": 1e-3,
    "decay_style": "cosine",
    "warmup_iters": 2,
    "weight_decay": 0.1,
    "no_weight_decay": ["model.layers.1.*", "embedding.word_embeddings.weight"],
    "clip_grad": 0.0,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("optimizers")
    student = write_tiny_model(folder / "student", seed=1, tied=True, **SMALL)
    return student, write_tiny_model(folder / "teacher", seed=2, tied=False, **SMALL)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_a_plain_training_loop(run_on_ranks, models, tmp_path, momentum: float):
    from tests.support.reference_training import Recipe, train_reference

    recipe = Recipe.of(
        OPTIM,
        divergence="forward_kl",
        sgd_momentum=momentum,
        no_weight_decay=("model.layers.1.*", "model.embed_tokens.weight"),
    )
    expected = train_reference(*models, make_batches(4), recipe)
    optim = {**OPTIM, "sgd_momentum": momentum}
    config = write_config(tmp_path, *models, split=TP2_PP2, teacher_split=PP2, optim=optim)
    run_on_ranks(4, _train, config)
    before = load_file(models[0] / "model.safetensors")
    got = load_file(tmp_path / "trained.safetensors")
    for name, weight in expected.weights.items():
        moved = (weight - before[name].double()).norm()
        assert moved > 0, name
        assert (got[name].double() - weight).norm() <= 1e-4 * moved, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2), (2, PP2)], ids=str)
def test_sgd_resumes_bit_for_bit(run_on_ranks, models, tmp_path, num_ranks, split: Split, precision: str):
    config = write_config(
        tmp_path, *models, split=split, teacher_split=split, optim=OPTIM, train={"precision": precision}
    )
    run_on_ranks(num_ranks, check_resume, config)


def _train(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config
    from tests.support.export import export_weights

    config = load_config(config_file)
    parts = build_parts(config, make_world(rank, world_size))
    student = parts.student
    for iteration, batch in enumerate(make_batches(4)):
        update(parts, batch, iteration, config)
    file = config_file.parent / "trained.safetensors"
    export_weights(student.model, file, student.shapes, student.groups, student.dtype)
    leave()
