"""What may differ between a checkpoint's configuration and that of the run which resumes it. That the run then really uses
the new values: tests/distributed/test_checkpoint_store.py and tests/e2e."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config import ConfigError, GkdConfig, load_config
from megatron_gkd.config.base import OnResume, all_keys
from megatron_gkd.config.resume import check_resume, is_named, permitted_changes, rule_of
from tests.support.run_config import write_tree

FREE = (
    "student.parallel",
    "student.make_vocab_size_divisible_by",
    "teacher.parallel",
    "student.recompute",
    "teacher.micro_batch_size",
    "teacher.server_ip",
    "teacher.server_port",
    "teacher.api_key_env",
    "teacher.requests_in_flight",
    "teacher.request_timeout_s",
    "teacher.max_retries",
    "rollout.placement",
    "rollout.urls",
    "rollout.api_key_env",
    "rollout.tensor_model_parallel_size",
    "rollout.start_timeout_s",
    "rollout.request_timeout_s",
    "rollout.max_retries",
    "rollout.push_dir",
    "rollout.probe_tolerance",
    "rollout.mem_fraction_static",
    "rollout.num_threads",
    "rollout.on_engine_failure",
    "loss.tokens_per_chunk",
    "loss.backend",
    "loss.rows_per_pass",
    "optim.overlap_grad_reduce",
    "data.max_bad_rows",
    "train.train_iters",
    "train.epochs",
    "train.micro_batch_size",
    "train.output_dir",
    "train.max_skipped_updates",
    "evaluation",
    "checkpoint",
    "runtime",
    "logging",
)

FIXED = (
    "optim.optimizer",
    "optim.use_distributed_optimizer",
    "student.freeze",
    "student.lora",
    "train.precision",
)


@pytest.fixture
def run(config_file: Path, tree: dict[str, Any], tmp_path: Path) -> Path:
    """The file of a run that has written two checkpoints."""
    write_tree(config_file, tree, train={"output_dir": str(tmp_path / "run")})
    for iteration in (1, 2):
        _write_checkpoint(load_config(config_file), iteration)
    return config_file


def test_an_unchanged_configuration_resumes(run):
    config = load_config(run)
    check_resume(config)
    assert permitted_changes(_folder(config, 2), config) == []


def test_a_job_whose_engines_have_other_addresses_after_a_requeue_resumes(run):
    engines = "rollout={placement: external, urls: ['http://a:1'], api_key_env: A_KEY, push_dir: push}"
    check_resume(load_config(run, [engines]))


def test_a_run_without_checkpoints_starts(config_file):
    check_resume(load_config(config_file))


@pytest.mark.parametrize(
    ("override", "key", "old", "new"),
    [
        ("optim.lr=0.5", "optim.lr", "1e-05", "0.5"),
        ("gkd.lmbda=0.25", "gkd.lmbda", "0.5", "0.25"),
        ("data.shuffle=false", "data.shuffle", "True", "False"),
        ("rollout={kind: megatron}", "rollout.kind", "'sglang'", "'megatron'"),
    ],
)
def test_a_change_is_refused_with_both_values_and_accepted_when_it_is_allowed(run, override, key, old, new):
    with pytest.raises(ConfigError) as caught:
        check_resume(load_config(run, [override]))
    message = str(caught.value)
    assert f"{key} (was {old}, is {new})" in message
    assert "iter_0000002 was written with another configuration" in message
    for allowed in (key, key.partition(".")[0]):
        config = load_config(run, [override, f"checkpoint.allow_changes=[{allowed}]"])
        check_resume(config)
        assert key in [change.key for change in permitted_changes(_folder(config, 2), config)]


def test_the_message_holds_the_words_that_allow_all_changes(run):
    overrides = ["optim.lr=0.5", "gkd.lmbda=0.25", "checkpoint.allow_changes=[loss]", "loss.beta=0.1"]
    with pytest.raises(ConfigError) as caught:
        check_resume(load_config(run, overrides))
    advice = "checkpoint.allow_changes=[loss,optim.lr,gkd.lmbda]"
    assert set(_listed(str(caught.value))) == set(_listed(advice))
    check_resume(
        load_config(run, [*overrides, "checkpoint.allow_changes=[" + ",".join(_listed(advice)) + "]"])
    )


def _listed(text: str) -> list[str]:
    return text.rpartition("allow_changes=[")[2].rstrip("]").split(",")


def test_what_is_computed_where_may_change_freely_and_is_reported(run):
    overrides = [
        "student.parallel.tensor_model_parallel_size=2",
        "train.micro_batch_size=2",
        "train.train_iters=9",
        "rollout.start_timeout_s=9",
        "loss.tokens_per_chunk=9",
        "logging.num_samples=9",
    ]
    config = load_config(run, overrides)
    check_resume(config)
    reported = {str(change) for change in permitted_changes(_folder(config, 2), config)}
    assert "train.train_iters (was 2, is 9)" in reported
    assert len(reported) == len(overrides)


def test_a_path_spelled_otherwise_is_no_change(run, tmp_path):
    config = load_config(run, [f"teacher.hf={tmp_path}/./teacher/"])
    assert permitted_changes(_folder(config, 2), config) == []


@pytest.mark.parametrize("override", ["optim.use_distributed_optimizer=true", "train.precision=fp32"])
def test_what_decides_the_form_of_the_optimizer_state_cannot_be_allowed(run, override):
    key = override.partition("=")[0]
    with pytest.raises(
        ConfigError, match=f"cannot be continued with {key}.*student.checkpoint=.*iter_0000002"
    ):
        check_resume(load_config(run, [override, f"checkpoint.allow_changes=[{key}]"]))


def test_the_newest_checkpoint_counts(run):
    changed = load_config(run, ["optim.lr=0.5"])
    _write_checkpoint(changed, 3)
    check_resume(changed)
    with pytest.raises(ConfigError, match="iter_0000003"):
        check_resume(load_config(run))


def test_a_run_that_does_not_resume_may_change_anything(run):
    check_resume(load_config(run, ["optim.lr=0.5", "checkpoint.resume=false"]))


def test_a_name_that_is_no_key_is_refused_with_the_nearest(run):
    with pytest.raises(ConfigError, match=r"names 'optim.lrr', which is no key; did you mean 'optim.lr'"):
        load_config(run, ["checkpoint.allow_changes=[optim.lrr]"])


def test_every_name_in_the_lists_is_a_key():
    assert {*FREE, *FIXED} <= set(all_keys(GkdConfig))


def test_every_key_has_the_rule_that_was_decided_for_it():
    """A key that is in neither list must be named to change."""
    keys = [key for key in all_keys(GkdConfig) if not _is_section(key)]
    assert {key for key in keys if rule_of(key) is OnResume.FREE} == {k for k in keys if is_named(k, FREE)}
    assert {key for key in keys if rule_of(key) is OnResume.FIXED} == {k for k in keys if is_named(k, FIXED)}


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("runtime.env_vars.NCCL_DEBUG", OnResume.FREE),
        ("logging.a_key_that_was_removed", OnResume.FREE),
        ("loss.a_key_that_was_removed", OnResume.BY_NAME),
        ("a_section_that_was_removed.key", OnResume.BY_NAME),
    ],
)
def test_a_key_outside_the_schema_has_the_rule_of_its_section(key, rule):
    assert rule_of(key) is rule


def _is_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in all_keys(GkdConfig))


def _folder(config: GkdConfig, iteration: int) -> Path:
    return config.checkpoint_dir / f"iter_{iteration:07d}"


def _write_checkpoint(config: GkdConfig, iteration: int) -> None:
    folder = _folder(config, iteration)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
