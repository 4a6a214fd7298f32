"""The gradient of the output layer goes straight into Megatron's sum: same gradients as through autograd, fewer [V, H].

Not here: that these gradients train as one rank does (test_layouts), and the loss by itself (tests/unit/losses).
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from tests.support.counting import counted
from tests.support.on_ranks import DP, PP2, PP2_VPP2, TP2, TP2_SP, Split
from tests.support.run_config import write_config
from tests.support.run_parts import FOUR_LENGTHS, build_parts, leave, make_batch, make_world, update
from tests.support.tiny_models import FOUR_LAYERS, write_tiny_model

SIZES = {**FOUR_LAYERS, "gain": 1 / 3}
OVERLAPPED = {"overlap_grad_reduce": True, "use_distributed_optimizer": True}
CASES: list[tuple[Split, dict[str, Any]]] = [
    (TP2, {}),
    (TP2_SP, OVERLAPPED),
    (PP2, {}),
    (PP2, OVERLAPPED),
    (PP2_VPP2, OVERLAPPED),
    (DP, OVERLAPPED),
]


class Outcome(NamedTuple):
    """One update on one rank."""

    gradients: dict[str, Any]  # sums over micro-batches and tokens
    allocated: int  # elements
    head_size: int  # elements; 0 off the last stage
    num_copies: int  # of the model, each with its part of the micro-batches
    grad_norm: float


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("main_grad")
    return {tied: write_tiny_model(folder / str(tied), tied=tied, seed=1, **SIZES) for tied in (True, False)}


@pytest.mark.parametrize(("split", "optim"), CASES, ids=str)
def test_gradients_are_those_of_autograd_without_its_copies(
    run_on_ranks, models, tmp_path, split: Split, optim: dict
):
    jobs = []
    for tied, student in models.items():
        for precision in ("fp32", "bf16"):
            train = {"precision": precision, "global_batch_size": 4, "micro_batch_size": 1}
            folder = tmp_path / f"{tied}_{precision}"
            pair = student, models[not tied]
            jobs.append(write_config(folder, *pair, split=split, teacher_split=DP, optim=optim, train=train))
    run_on_ranks(2, _compare, jobs)


def _compare(rank: int, world_size: int, jobs: list[Path]) -> None:
    from megatron_gkd.config import load_config

    for job in jobs:
        config = load_config(job)
        direct, through_autograd = (_update_once(rank, world_size, config, way) for way in (True, False))
        is_fp32 = config.train.precision == "fp32"
        bound = 1e-6 if is_fp32 else 1e-2  # autograd rounds each micro-batch's gradient of the head to bf16
        for name, want in through_autograd.gradients.items():
            error = (direct.gradients[name] - want).norm()
            assert want.norm() > 0, name
            assert error <= bound * want.norm(), f"{job.parent.name} {name}: {error / want.norm()}"
        assert direct.grad_norm == pytest.approx(through_autograd.grad_norm, rel=bound)
        # each micro-batch saves its scaled copy, and in bf16 the rounded one
        num_micro_batches = len(FOUR_LENGTHS) // direct.num_copies
        saved = through_autograd.allocated - direct.allocated
        assert saved >= direct.head_size * num_micro_batches * (1 if is_fp32 else 2)


def _update_once(rank: int, world_size: int, config: Any, is_direct: bool) -> Outcome:
    from megatron_gkd.models.gpt import head_weight

    through_autograd = patch("megatron_gkd.train.step.main_grad_adder", lambda parameter: None)
    parts = build_parts(config, make_world(rank, world_size))
    with nullcontext() if is_direct else through_autograd, counted() as counts:
        result, _ = update(parts, make_batch(0, FOUR_LENGTHS), 0, config)
    gradients = {
        name: parameter.main_grad.clone() for name, parameter in parts.student.model.named_parameters()
    }
    student = parts.student
    head_size = head_weight(student.model).numel() if student.groups.is_last_stage else 0
    num_copies = student.groups.layout.dp_size
    leave()
    return Outcome(gradients, counts.total_allocated, head_size, num_copies, result.grad_norm)
