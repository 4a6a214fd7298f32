"""When held-out rows are measured, and their draws. What is measured: tests/distributed/test_validation.py."""

import pytest
import torch

from megatron_gkd.config import load_config
from megatron_gkd.data.sample import Prompt, Sharding
from megatron_gkd.train.evaluation import Evaluation, own_draws
from tests.unit.config.conftest import config_file, tree

__all__ = ["config_file", "tree"]

SHARDING = Sharding(micro_batch_size=1, dp_rank=0, dp_size=1, pad_id=0, multiple_of=1)


@pytest.mark.parametrize(
    ("overrides", "due"),
    [
        ([], [7]),
        (["evaluation.interval=3"], [3, 6, 7]),
        (["checkpoint.save_interval=2"], [7]),
        (["checkpoint.save_interval=2", "checkpoint.keep_best_metric=validation/loss"], [2, 4, 6, 7]),
    ],
)
def test_it_is_due_at_its_interval_the_end_and_saves_that_need_it(config_file, tmp_path, overrides, due):
    (tmp_path / "held_out.jsonl").write_text("")
    config = load_config(
        config_file, [f"evaluation.files={tmp_path / 'held_out.jsonl'}", "train.train_iters=7", *overrides]
    )
    evaluation = Evaluation([Prompt(0, (1, 2), (3,), "")], config, SHARDING)
    assert [iteration for iteration in range(1, 8) if evaluation.is_due(iteration)] == due


def test_draws_of_a_validation_repeat_and_leave_those_of_training_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    draws = []
    for _ in range(2):
        with own_draws(torch.device("cpu")):
            draws.append(torch.rand(3))
    assert draws[0].equal(draws[1])
    assert torch.rand(2).equal(expected)
