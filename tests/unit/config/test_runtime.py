"""The runtime section: what may be set, and the shipped file. That it is applied: tests/unit/cli/test_pretrain.py."""

import pytest

from megatron_gkd.config import ConfigError, load_config
from tests.support.processes import ROOT

RUNTIME_FILE = ROOT / "configs" / "runtime_env.yaml"


@pytest.mark.parametrize("order", [1, -1])
def test_the_shipped_file_is_a_further_config_before_or_after_the_own_one(config_file, order):
    config = load_config([config_file, RUNTIME_FILE][::order], ["runtime.env_vars.NCCL_DEBUG=INFO"])
    runtime = config.runtime
    assert runtime.env_vars["NCCL_DEBUG"] == "INFO"
    assert runtime.env_vars["OMP_NUM_THREADS"] == "1"
    files = [value for name, value in runtime.env_vars.items() if name.endswith("_FILE")]
    assert files
    assert all("{host}" in value and "{process}" in value for value in [*files, runtime.log_file])
    assert runtime.excludes == load_config(config_file).runtime.excludes


def test_numbers_become_texts_and_null_takes_a_variable_out(config_file):
    config = load_config([config_file, RUNTIME_FILE], ["runtime.env_vars.NCCL_DEBUG=null"])
    assert config.runtime.env_vars["NCCL_DEBUG"] is None
    assert config.runtime.env_vars["CUDA_LAUNCH_BLOCKING"] == "0"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env_vars.WORLD_SIZE=2", "runtime.env_vars: WORLD_SIZE belongs to torchrun"),
        ("env_vars.TORCHELASTIC_RUN_ID=2", "belongs to torchrun"),
        ("env_vars.LD_PRELOAD=lib.so", "read when a process starts, before this file; set it in the shell"),
        ("env_vars.PYTHONHASHSEED=0", "read when a process starts"),
        ("env_vars={'A-B': 1}", "'A-B' is not the name of an environment variable"),
        (
            "env_vars.A='{output_dir}/{rank}'",
            r"A has the unknown placeholder \{rank\}; known: \{output_dir\}",
        ),
        ("env_vars.A=true", r"runtime.env_vars.A: should be a valid string \(got True\)"),
        ("log_file='logs/{host}.log'", r"runtime.log_file: needs \{process\}"),
        ("log_file='logs/{proces}.log'", r"unknown placeholder \{proces\}"),
        ("excludes=[/]", "matches nothing"),
        ("excludes=[a/b]", "'a/b' is a path; begin it with /"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [f"runtime.{override}"])
