"""Which back end of the loss ``auto`` means.

Not covered here: what the back ends compute (tests/unit/losses).
"""

import logging
from typing import get_args

import pytest
import torch

from megatron_gkd.config import ConfigError, load_config
from megatron_gkd.config.loss import Backend
from megatron_gkd.losses.kernels import BACKENDS
from megatron_gkd.train.backend import require_loss_backend, with_backend
from tests.unit.config.conftest import config_file, tree

__all__ = ["config_file", "tree"]

SHORT = ["train.train_iters=30", "train.global_batch_size=14", "rollout.max_new_tokens=40"]
LONG = ["train.train_iters=1000", "train.global_batch_size=64", "rollout.max_new_tokens=256"]


def backend_of(config_file, overrides, device="cpu"):
    config = load_config(config_file, ["train.micro_batch_size=2", *overrides])
    sizes = {"tp_size": 2, "dp_size": 1, "vocab_size": 49152}
    return with_backend(config, **sizes, device=torch.device(device)).loss.backend


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        (SHORT, "cpu", "eager"),
        (LONG, "cpu", "compiled"),
        ([*LONG, "loss.divergence=adaptive_kl"], "cpu", "eager"),
        ([*LONG, "loss.support=teacher_top_k"], "cpu", "eager"),
        ([*SHORT, "loss.backend=compiled"], "cpu", "compiled"),
        ([*LONG, "loss.backend=eager"], "cpu", "eager"),
        (LONG, "cuda", "auto"),
    ],
)
def test_a_run_is_compiled_for_only_if_it_is_long_enough_or_told_to(config_file, overrides, device, expected):
    assert backend_of(config_file, overrides, device) == expected


def test_the_choice_is_logged_with_its_reason(config_file, caplog):
    caplog.set_level(logging.INFO)
    backend_of(config_file, SHORT)
    assert "Loss back end: eager, because compiling takes about 30 s and saves at most 2 s" in caplog.text


def test_kernels_for_a_gpu_are_refused_without_one(config_file):
    config = load_config(config_file, ["loss.backend=triton"])
    require_loss_backend(config, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"loss\.backend=triton needs a GPU.*set loss\.backend=auto"):
        require_loss_backend(config, torch.device("cpu"))


def test_every_back_end_has_a_name_in_the_configuration():
    assert set(get_args(Backend)) == set(BACKENDS)
