"""Files and overrides become one frozen tree, or one error that lists every problem.

Rules that look into the model folders or need the number of ranks: test_check.py.
"""

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_gkd.config import (
    ConfigError,
    GkdConfig,
    MegatronRolloutConfig,
    SglangRolloutConfig,
    load_config,
)


def test_later_files_and_then_overrides_win(config_file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("optim: {lr: 2e-5, warmup_iters: 1}\nloss: {beta: 0.1}\n")
    config = load_config([config_file, second], ["optim.lr=3e-4", "loss.divergence=jsd"])
    assert (config.optim.lr, config.optim.warmup_iters) == (3e-4, 1)
    assert (config.loss.divergence, config.loss.beta) == ("jsd", 0.1)


def test_an_override_can_be_a_whole_section_or_a_list(config_file):
    config = load_config(
        config_file, ["student.parallel={tensor_model_parallel_size: 2}", 'rollout.stop=["\\n", b]']
    )
    assert config.student.parallel.tensor_model_parallel_size == 2
    assert config.rollout.stop == ("\n", "b")


def test_an_override_value_may_contain_an_equals_sign(config_file):
    assert load_config(config_file, ["train.output_dir=runs/a=b"]).train.output_dir == Path("runs/a=b")


def test_all_problems_are_reported_at_once_with_key_and_hint(config_file):
    overrides = [
        "optim.lr=-1",
        "loss.divergence=foward_kl",
        "loss.beta=true",
        "paralel.tp=2",
        "lr=3",
        "train.train_iters=ten",
        "rollout.kind=vllm",
        "student.parallel.tensor_paralel_size=2",
        "data.prompts=null",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides)
    message = str(caught.value)
    assert message.startswith("9 problems in ")
    for part in (
        "optim.lr: should be greater than 0 (got -1)",
        "or 'tvd'; did you mean 'forward_kl'? (got 'foward_kl')",
        "loss.beta: true and false are not accepted here (got True)",
        "paralel: unknown key; did you mean 'student.parallel' or 'teacher.parallel'?",
        "lr: unknown key; did you mean 'optim.lr'?",
        "train.train_iters: should be a valid integer",
        "rollout.kind: must be one of sglang, megatron (got 'vllm')",
        "student.parallel.tensor_paralel_size: unknown key; did you mean 'tensor_model_parallel_size'?",
        "data.prompts: is required; A file, or a list of files",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nothing", "not of the form section.key=value"),
        ("optim..lr=1", "not of the form section.key=value"),
        ("train.seed=[1", r"override 'train.seed=\[1', line 1"),
        ("optim=3", "optim=3 would replace a whole section"),
        ("optim.lr.x=1", "optim.lr.x cannot be set, because optim.lr is a value"),
        ("rollout=3", "rollout: must be a section with keys"),
        ("rollout.stop=a", "rollout.stop: should be a list"),
        ("rollout.stop=['']", "an empty text would stop every completion"),
        ("rollout.top_k=0", r"must be -1 \(off\) or at least 1"),
        ("rollout.placement=external", "placement=external needs urls"),
        ("rollout.urls=['http://a:1']", "placement=colocated ignores them"),
        ("rollout.api_key_env=A_KEY", "api_key_env='A_KEY' is for placement=external"),
        ("rollout={placement: external, urls: ['a:1']}", "must start with http"),
        (
            "rollout={placement: external, urls: ['http://a:1'], tensor_model_parallel_size: 2, num_threads: 3}",
            "tensor_model_parallel_size=2, num_threads=3 would be ignored with placement=external: .*; remove it or set",
        ),
        (
            "rollout={placement: external, urls: ['http://a:1'], mem_fraction_static: 0.8}",
            "mem_fraction_static=0.8",
        ),
        ("rollout={placement: external, urls: ['http://a:1'], start_timeout_s: 9}", "start_timeout_s=9"),
        ("student.hf=null", "neither is given"),
        ("student.hf=", "neither is given"),
        ("student.hf=''", "the path is empty"),
        ("student.checkpoint=x", "both given, set one to null"),
        ("student.parallel.sequence_parallel=true", "needs tensor_model_parallel_size > 1"),
        (
            "student.parallel.virtual_pipeline_model_parallel_size=2",
            r"virtual_pipeline_model_parallel_size=2 needs pipeline_model_parallel_size > 1 \(it is 1\)",
        ),
        ("optim={optimizer: sgd, use_distributed_optimizer: true}", r"saves and loads Adam's state only"),
        ("student.recompute.modules=[]", "student.recompute.modules: .*at least 1 item"),
        ("student.recompute.granularity=layers", "must be 'none', 'selective' or 'full'|should be 'none'"),
        ("teacher.parallel.virtual_pipeline_model_parallel_size=2", "unknown key"),
        ("optim={lr: 1e-5, min_lr: 1e-4}", "min_lr=0.0001 is above lr"),
        (
            "optim={warmup_iters: 1, warmup_fraction: 0.1}",
            "warmup_fraction=0.1 are both given; set one of them to 0",
        ),
        ("optim.no_weight_decay=[' ']", "an empty pattern matches nothing"),
        ("train.epochs=2", "exactly one of train_iters and epochs; both are given, set one to 0"),
        ("train.train_iters=0", "exactly one of train_iters and epochs; neither is given"),
        (
            "student={freeze: ['*'], lora: {rank: 8}}",
            "freeze=.* and lora.rank=8 are both given.*remove freeze",
        ),
        ("student.lora.targets=[linear_qkv, q_proj]", "student.lora.targets.*'linear_qkv', 'linear_proj'"),
        ("student.lora.targets=[]", "at least 1 item"),
        ("optim.adam_eps=.inf", "should be a finite number"),
        ("train.seed=1.5", "should be a valid integer"),
        ("data.prompts=3", r"data.prompts: should be a list \(got 3\)"),
        ("data.prompts=[a, 3]", r"data.prompts\[1\]: .*path"),
        ("data.prompts=[]", r"data.prompts: the list is empty; give at least one file"),
        ("data.prompts=''", r"data.prompts: a path is empty; remove it"),
        ("data.weights=[1, 2]", r"2 numbers for 1 files of prompts; give one per file"),
        ("data.weights=[0]", r"weights=\[0.0\]: every weight must be above 0"),
        ("data.completion_key=prompt", "must be four different columns"),
        ("data.dataset_class=rows.py", r"must be package.module:Name or file.py:Name \(got 'rows.py'\)"),
        ("data.tokenizer_kind=tiktoken", "data.tokenizer_kind: should be 'auto', 'hf' or 'sentencepiece'"),
        ("data.truncation=middle", "data.truncation: should be 'error', 'left' or 'right'"),
        ("evaluation.interval=5", "interval=5 and num_rows=None .*evaluation.files, which is empty"),
    ],
)
def test_a_wrong_override_is_named_with_its_fix(config_file, override, message):
    config_file.write_text(config_file.read_text() + "optim: {lr: 1.0e-5}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1\n", "broken.yaml, line 2"),
        ("optim:\n  lr: 1\n  lr: 2\n", "broken.yaml, line 3, column 3: the key 'lr' is given a second time"),
        ("1: 2\n", "the key 1 is not a text"),
        ("- a\n", "broken.yaml holds list; a mapping of sections is needed"),
        ("a: !!python/name:os.system x\n", "broken.yaml, line 1"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, message):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_section_without_keys_means_its_defaults(config_file):
    config_file.write_text(config_file.read_text() + "optim:\nloss:\nrollout:\n")
    config = load_config(config_file)
    assert config == load_config(config_file, ["optim.lr=1e-5"])
    assert isinstance(config.rollout, SglangRolloutConfig)


def test_changing_the_kind_leaves_out_keys_of_the_former_kind_and_says_so(config_file, caplog):
    config_file.write_text(config_file.read_text() + "rollout: {num_threads: 2, temperature: 0.5}\n")
    with caplog.at_level(logging.INFO):
        config = load_config(config_file, ["rollout.kind=megatron"])
    assert config.rollout == MegatronRolloutConfig(temperature=0.5)
    assert "rollout.kind=megatron, which has no num_threads" in caplog.text


def test_a_key_of_another_kind_is_refused_after_the_kind(config_file):
    with pytest.raises(ConfigError, match=r"rollout\.urls: unknown key for kind megatron"):
        load_config(config_file, ["rollout.kind=megatron", "rollout.urls=[a]"])


@pytest.mark.parametrize("kind", ["sglang", "megatron"])
def test_the_written_tree_is_read_back_unchanged(config_file, tmp_path, kind):
    overrides = [
        f"rollout.kind={kind}",
        "rollout.stop=['\\n', 'h\u00e9: #']",
        "optim.adam_eps=1e-8",
        "train.output_dir='1'",
    ]
    config = load_config(config_file, overrides)
    written = tmp_path / "written.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config
    assert load_config(written).to_yaml() == config.to_yaml()


def test_the_resolved_configuration_with_external_engines_is_accepted_whole(config_file):
    config = load_config(config_file, ["rollout={placement: external, urls: ['http://a:1']}"])
    assert "mem_fraction_static: 0.4" in config.to_yaml()
    config_file.write_text(config.to_yaml())
    assert load_config(config_file) == config


def test_relative_paths_are_kept_as_given(config_file):
    assert load_config(config_file).train.output_dir == Path("runs/test")


def test_a_loaded_tree_cannot_be_changed(config_file):
    config = load_config(config_file)
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0


def test_seq_length_is_prompt_plus_completion(config_file):
    config = load_config(config_file, ["data.max_prompt_length=100", "rollout.max_new_tokens=23"])
    assert config.seq_length == 123


def test_every_key_has_a_sentence():
    from megatron_gkd.config.base import sections_of

    def check(section, prefix):
        assert section.__doc__, prefix
        for name, field in section.model_fields.items():
            inner = sections_of(field)
            assert inner or field.description, f"{prefix}{name} has no sentence"
            for kind in inner.values():
                check(kind, f"{prefix}{name}.")

    check(GkdConfig, "")
