"""Frozen weights have no gradient and no optimizer state, stay as they are, and go along in exports and pushes.

Which weights a pattern means: tests/unit/models/test_patterns.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.on_ranks import DP, PP2, TP2, TP2_PP2, TP2_SP, Split
from tests.support.run_config import OPTIM, write_config
from tests.support.run_parts import (
    build_parts,
    check_resume,
    leave,
    make_batches,
    make_world,
    update,
)
from tests.support.tiny_models import SMALL, write_tiny_model

FREEZE = [
    "model.embed_tokens.weight",
    "decoder.layers.0.self_attention.*",
    "*.1.mlp.down_proj.*",
    "*norm.weight",
]
FROZEN_IN_HF = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.*",
    "*.1.mlp.down_proj.*",
    "*norm.weight",
)
FIRST_STAGE = ["embedding.*", "model.layers.0.*"]
NORMS_OF_LAST_STAGE = ["model.layers.1.*norm.weight", "model.norm.weight"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("freezing")
    student = write_tiny_model(folder / "student", seed=1, tied=request.param, **SMALL)
    return student, write_tiny_model(folder / "teacher", seed=2, tied=True, **SMALL)


@pytest.fixture(scope="module")
def expected(models) -> dict[str, torch.Tensor]:
    from tests.support.reference_training import Recipe, train_reference

    recipe = Recipe.of(OPTIM, divergence="forward_kl", clip_grad=1.0, freeze=FROZEN_IN_HF)
    return train_reference(*models, make_batches(4), recipe).weights


@pytest.mark.parametrize(
    ("num_ranks", "split", "is_distributed"),
    [(2, TP2_SP, False), (2, PP2, False), (4, TP2_PP2, False), (2, DP, True), (4, TP2, True)],
    ids=str,
)
def test_the_others_train_as_in_a_plain_loop(
    run_on_ranks, models, expected, tmp_path, num_ranks, split: Split, is_distributed
):
    student, optim = {"freeze": FREEZE}, OPTIM | {"use_distributed_optimizer": is_distributed}
    config = write_config(tmp_path, *models, split=split, teacher_split=split, optim=optim, student=student)
    run_on_ranks(num_ranks, _train, config)
    before = load_file(models[0] / "model.safetensors")
    exported, pushed = (load_file(tmp_path / f"{name}.safetensors") for name in ("exported", "pushed"))
    num_frozen = 0
    for name, weight in expected.items():
        assert torch.equal(exported[name], pushed[name]), name
        moved = (weight - before[name].double()).norm()
        num_frozen += int(moved == 0)
        # Adam follows the sign of gradients that are close to zero; measured: 1.1e-4
        assert (exported[name].double() - weight).norm() <= 5e-4 * moved, name
    assert num_frozen == 1 + 4 + 1 + 2 * 2 + 1


@pytest.mark.parametrize(
    ("freeze", "precision", "split"),
    [
        (FIRST_STAGE, "fp32", PP2),
        (FIRST_STAGE, "bf16", PP2),
        (NORMS_OF_LAST_STAGE, "bf16", PP2),  # no weights without decay are left there
        (FREEZE, "bf16", TP2),
    ],
    ids=["first stage", "first stage in bf16", "norms of the last stage", "some of each layer"],
)
def test_a_run_resumes_bit_for_bit_wherever_its_frozen_weights_lie(
    run_on_ranks, models, tmp_path, freeze: list[str], precision: str, split: Split
):
    config = write_config(
        tmp_path,
        *models,
        split=split,
        teacher_split=split,
        optim=OPTIM,
        student={"freeze": freeze},
        train={"precision": precision},
    )
    run_on_ranks(2, check_resume, config)


@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2_SP), (2, PP2)], ids=str)
def test_full_recomputation_changes_nothing_behind_a_frozen_embedding(
    run_on_ranks, models, tmp_path, num_ranks, split: Split
):
    student = {"freeze": ["embedding.*"]}
    config = write_config(tmp_path, *models, split=split, teacher_split=split, optim=OPTIM, student=student)
    run_on_ranks(num_ranks, _recompute, config)


def _recompute(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config

    outcomes = []
    for granularity in (None, "full"):
        parts = build_parts(load_config(config_file), make_world(rank, world_size))
        settings = parts.student.model.config
        settings.recompute_granularity, settings.recompute_method = granularity, "uniform"
        settings.recompute_num_layers = 1
        outcomes.append(
            [update(parts, batch, i, load_config(config_file)) for i, batch in enumerate(make_batches(4))]
        )
        leave()
    assert outcomes[0] == outcomes[1]


def _train(rank: int, world_size: int, config_file: Path) -> None:
    from megatron_gkd.config import load_config
    from megatron_gkd.rollout.weight_sync import SharedWeightFile
    from tests.support.export import export_weights

    config, folder = load_config(config_file), config_file.parent
    parts = build_parts(config, make_world(rank, world_size))
    student = parts.student
    for iteration, batch in enumerate(make_batches(4)):
        update(parts, batch, iteration, config)
    parameters = dict(student.model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    assert 0 < len(trained) < len(parameters)
    assert all(
        p.grad is None and not hasattr(p, "main_grad") for p in parameters.values() if not p.requires_grad
    )
    buffers = [buffer for ddp in student.ddp for buffer in ddp.buffers]
    buffer_size = sum(buffer.numel_unpadded for buffer in buffers)
    num_optimized = len(student.optimizer.get_parameters())
    if config.optim.use_distributed_optimizer:
        # weights begin at multiples; every rank holds the state of a part
        assert sum(p.numel() for p in trained) <= buffer_size < sum(p.numel() for p in parameters.values())
        assert 0 < num_optimized <= len(trained)
    else:
        assert buffer_size == sum(p.numel() for p in trained)
        assert num_optimized == len(trained)
    export_weights(
        student.model, folder / "exported.safetensors", student.shapes, student.groups, student.dtype
    )
    file = SharedWeightFile(folder / "push", student, parameters)
    pushed, _ = file.write(1)
    if rank == 0:
        (pushed / "model.safetensors").rename(folder / "pushed.safetensors")
    leave()
