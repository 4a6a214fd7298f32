"""Rules between sections, against config.json and against the number of ranks; which models are supported:
test_hf_shapes.py."""

import json
from pathlib import Path

import pytest

from megatron_gkd.config import ConfigError, check_world, load_config
from tests.unit.config.conftest import write_hf_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.num_samples=3"], "train.global_batch_size=8 is not a multiple of rollout.num_samples=3"),
        (["optim.warmup_iters=3"], "optim.warmup_iters=3 is above train.train_iters=2"),
        (
            ["optim={decay_style: wsd, warmup_iters: 1, wsd_decay_fraction: 1}"],
            r"1 .*warm-up and 2 of decay .*run's 2",
        ),
        (["data.prompts=nowhere.jsonl"], "data.prompts='nowhere.jsonl': no such file"),
        (["student.hf=nowhere"], "student.hf='nowhere': no such folder"),
        (["student.hf=null", "student.checkpoint=nowhere"], "student.checkpoint='nowhere': no such folder"),
        (["student.parallel.tensor_model_parallel_size=4"], "does not divide the model's 2 key-value heads"),
        (["teacher.parallel.tensor_model_parallel_size=3"], "does not divide the model's 4 attention heads"),
        (["teacher.parallel.pipeline_model_parallel_size=3"], "does not divide the model's 4 layers"),
        (["data.max_prompt_length=900"], r"= 1156 tokens, but the student was made for 1024"),
        (
            ["data.max_teacher_prompt_length=900"],
            r"max_teacher_prompt_length=900 \+ rollout.max_new_tokens=256 = 1156 tokens, but the teacher",
        ),
        (
            [
                "student.hf=null",
                "student.checkpoint=OUTPUT/checkpoints/iter_0000001",
                "train.output_dir=OUTPUT",
            ],
            r"student.checkpoint='OUTPUT/.*' lies among the checkpoints .* name another train.output_dir",
        ),
        (["data.prompts=[a.jsonl]"], "data.prompts='a.jsonl': no such file"),
        (["evaluation.files=b.parquet"], "evaluation.files='b.parquet': no such file"),
        (["data.chat_template=c.jinja"], "data.chat_template='c.jinja': no such file"),
        (["checkpoint.keep_best_metric=validation/loss"], "needs evaluation.files, or nothing measures it"),
        (["data.tokenizer=d"], "data.tokenizer='d': no such file or folder"),
        (
            [
                "rollout={kind: megatron}",
                "student.parallel={tensor_model_parallel_size: 2, sequence_parallel: true}",
            ],
            "rollout.kind=megatron",
        ),
        (
            [
                "rollout={kind: megatron}",
                "student.parallel={pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}",
            ],
            r"virtual_pipeline_model_parallel_size=2 would repeat; set it to 1 or use rollout.kind=sglang",
        ),
        (
            ["student.parallel={pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 3}"],
            r"student.parallel.virtual_pipeline_model_parallel_size=3 does not divide the 2 layers",
        ),
        (
            ["teacher={kind: none}"],
            r"loss.sft_weight=0.0 leaves a share .* set loss.sft_weight=1 or give a teacher",
        ),
        (["loss.sft_weight=1"], "nothing for teacher.kind=megatron; set teacher.kind=none"),
        (
            ["loss={support: token, divergence: reverse_kl}"],
            r"loss.support=token .* but gkd.lmbda=0.5 .* set gkd.lmbda=1",
        ),
        (["loss.support=token"], "support=token estimates reverse_kl, but divergence=forward_kl"),
        (["loss.estimator=k2"], "estimator=k2 is for support=token, but support=full ignores it; remove it"),
        (
            ["loss={support: sampled, policy_gradient: true}"],
            "policy_gradient=true is for support=token, but support=sampled ignores it; remove it",
        ),
        (["loss={support: union, divergence: adaptive_kl}"], "but support=union; set support=full"),
        (["rollout.tensor_model_parallel_size=3"], "does not divide the student's 4 attention heads"),
    ],
)
def test_a_broken_rule_is_named_with_its_numbers(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, overrides)


ESTIMATOR = ["loss={support: token, divergence: reverse_kl}", "gkd.lmbda=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.temperature=0.7"],
            r"loss.temperature=1.0, but rollout.temperature=0.7 .* set rollout.temperature=1.0",
        ),
        (["loss.temperature=2"], r"rollout.temperature=1.0 draws others; set rollout.temperature=2.0"),
        (["rollout.top_p=0.9"], r"rollout.top_p=0.9 draws from a part of it; set rollout.top_p=1"),
        (["rollout.top_k=50"], r"rollout.top_k=50 draws from a part of it; set rollout.top_k=-1"),
        (
            ["evaluation.files=EXISTS"],
            r"evaluation.files=\['.*'\] holds those of others.* evaluation.files=\[\]",
        ),
    ],
)
def test_an_estimate_from_tokens_not_drawn_from_the_student_is_refused(config_file, tree, overrides, message):
    overrides = [override.replace("EXISTS", tree["data"]["prompts"]) for override in overrides]
    load_config(config_file, ESTIMATOR)
    load_config(config_file, overrides)
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, ESTIMATOR + overrides)


def test_an_estimate_whose_gradient_has_the_mean_0_is_refused(config_file):
    section = "loss={{support: token, divergence: reverse_kl, estimator: k1, policy_gradient: {}}}"
    load_config(config_file, [section.format("true"), "gkd.lmbda=1"])
    with pytest.raises(
        ConfigError, match=r"loss.estimator=k1 .* set loss.policy_gradient=true, or .*k2 or k3"
    ):
        load_config(config_file, [section.format("false"), "gkd.lmbda=1"])


@pytest.mark.parametrize("kind", ["sglang", "megatron"])
def test_an_estimate_at_another_temperature_takes_tokens_drawn_at_it(config_file, kind):
    overrides = [*ESTIMATOR, "loss.temperature=2", f"rollout={{kind: {kind}, temperature: 2}}"]
    config = load_config(config_file, overrides)
    assert (config.rollout.kind, config.rollout.temperature, config.loss.temperature) == (kind, 2, 2)


def test_without_a_teacher_no_key_of_one_is_needed_or_known(config_file):
    config = load_config(config_file, ["teacher={kind: none}", "loss.sft_weight=1"])
    assert list(config.models) == ["student"]
    check_world(config, 4)
    with pytest.raises(ConfigError, match=r"teacher\.hf: unknown key for kind none"):
        load_config(config_file, ["teacher={kind: none, hf: x}", "loss.sft_weight=1"])


def test_rules_are_reported_together(config_file):
    with pytest.raises(ConfigError, match="4 problems") as caught:
        load_config(config_file, ["rollout.num_samples=3", "data.prompts=a", "student.hf=b", "teacher.hf=c"])
    assert str(caught.value).count("\n") == 4


def test_sequences_beyond_the_sliding_window_are_refused(config_file, tmp_path):
    write_hf_config(tmp_path / "teacher", model_type="mistral", sliding_window=300)
    load_config(config_file, ["data.max_prompt_length=44"])  # 256 more for the completion
    with pytest.raises(ConfigError, match=r"= 301 tokens, .* the teacher .*sliding_window=300 only"):
        load_config(config_file, ["data.max_prompt_length=45"])


def test_longer_teacher_prompts_count_for_its_sliding_window_not_the_students(config_file, tmp_path):
    lengths = ["data.max_prompt_length=44", "data.max_teacher_prompt_length=45"]
    write_hf_config(tmp_path / "student", model_type="mistral", sliding_window=300)
    load_config(config_file, lengths)
    write_hf_config(tmp_path / "teacher", model_type="mistral", sliding_window=300)
    with pytest.raises(
        ConfigError,
        match=r"data.max_teacher_prompt_length=45 \+ .*=256 = 301 tokens, .* the teacher .*sliding_window=300 only",
    ):
        load_config(config_file, lengths)


def test_different_vocabularies_are_refused(config_file, tmp_path):
    write_hf_config(tmp_path / "teacher", vocab_size=1004)
    with pytest.raises(
        ConfigError, match=r"vocab_size=1003 and the teacher .*vocab_size=1004; both must use the same"
    ):
        load_config(config_file)


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "num_ids", "is_accepted"),
    [
        (1003, 1024, 1000, True),
        (1003, 1024, 1003, True),
        (1003, 1024, 1004, False),
        (1024, 1003, 1000, False),
    ],
)
def test_a_teacher_may_have_more_rows_that_are_no_token(
    config_file, tmp_path, student_rows, teacher_rows, num_ids, is_accepted
):
    for name, rows in (("student", student_rows), ("teacher", teacher_rows)):
        folder = write_hf_config(tmp_path / name, vocab_size=rows)
        tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": num_ids - 1, "content": "<eos>"}]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if is_accepted:
        load_config(config_file)
    else:
        with pytest.raises(ConfigError, match=f"vocab_size={student_rows} and the teacher"):
            load_config(config_file)


def test_a_folder_without_config_json_is_refused(config_file, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is not a Hugging Face model: .*config\.json is missing"):
        load_config(config_file, [f"student.hf={tmp_path / 'empty'}"])


def test_an_unsupported_model_is_named_by_its_key_and_file(config_file, tmp_path):
    write_hf_config(tmp_path / "teacher", model_type="gemma")
    with pytest.raises(
        ConfigError, match=r"teacher\.hf=.*config\.json: model_type='gemma'; supported: llama"
    ):
        load_config(config_file)


def test_a_checkpoint_keeps_its_hugging_face_files_in_hf(config_file, tmp_path):
    write_hf_config(tmp_path / "checkpoint" / "hf")
    (tmp_path / "checkpoint" / "manifest.json").write_text('{"files": {}}')
    config = load_config(config_file, ["student.hf=null", f"student.checkpoint={tmp_path / 'checkpoint'}"])
    assert config.student.hf_folder == tmp_path / "checkpoint" / "hf"
    assert load_config(config_file).student.hf_folder == Path(tmp_path / "student")


PARALLEL = [
    "student.parallel.tensor_model_parallel_size=2",
    "teacher.parallel.pipeline_model_parallel_size=4",
]


@pytest.mark.parametrize("world_size", [4, 8])
def test_fitting_numbers_of_ranks_are_accepted(config_file, world_size):
    check_world(load_config(config_file, PARALLEL), world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "messages"),
    [
        (PARALLEL, 6, ["teacher.parallel: one copy takes", "4 ranks, which does not divide the 6 ranks"]),
        (
            PARALLEL,
            1,
            ["= 2 ranks, which does not divide the 1 ranks", "= 4 ranks, which does not divide the 1 ranks"],
        ),
        (PARALLEL, 0, ["= 2 ranks", "= 4 ranks"]),
        (
            ["train.micro_batch_size=3"],
            1,
            ["micro_batch_size=3 x 1 copies of the student; use a multiple of 3"],
        ),
        (
            [
                "student.parallel={pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}",
                "train.micro_batch_size=4",
            ],
            4,
            ["groups of pipeline_model_parallel_size=2 micro-batches, but every copy of the student has 1"],
        ),
        (
            ["train.global_batch_size=2"],
            4,
            ["micro_batch_size=1 x 4 copies of the student", "divisible by 4 copies of the teacher"],
        ),
    ],
)
def test_all_problems_with_the_number_of_ranks_are_named(config_file, overrides, world_size, messages):
    config = load_config(config_file, overrides)
    with pytest.raises(ConfigError) as caught:
        check_world(config, world_size)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("epochs", "num_prompts", "num_samples", "train_iters"),
    [
        (1, 16, 1, 2),
        (1, 17, 1, 3),
        (2, 17, 1, 5),
        (0.5, 16, 1, 1),
        (3, 4, 2, 3),
        (0.1, 30, 8, 3),
        (2.5, 1, 1, 1),
    ],
)
def test_epochs_become_iterations_that_use_every_prompt(
    config_file, epochs, num_prompts, num_samples, train_iters
):
    overrides = [f"train={{train_iters: 0, epochs: {epochs}}}", f"rollout.num_samples={num_samples}"]
    resolved = load_config(config_file, overrides).with_iterations(num_prompts)
    assert (resolved.train.train_iters, resolved.train.epochs) == (train_iters, 0)
    config_file.write_text(resolved.to_yaml())
    assert load_config(config_file) == resolved


def test_iterations_that_are_given_stay(config_file):
    config = load_config(config_file)
    assert config.with_iterations(None) is config


def test_epochs_of_a_stream_are_refused(config_file):
    config = load_config(config_file, ["train={train_iters: 0, epochs: 2}"])
    with pytest.raises(
        ConfigError, match=r"train\.epochs=2\.0 needs the number .* set train\.train_iters instead"
    ):
        config.with_iterations(None)


def test_a_warm_up_longer_than_the_epochs_is_refused_once_the_prompts_are_counted(config_file):
    config = load_config(config_file, ["train={train_iters: 0, epochs: 2}", "optim.warmup_iters=5"])
    assert config.with_iterations(20).train.train_iters == 5
    with pytest.raises(ConfigError, match=r"of 16 prompts:\n.*optim\.warmup_iters=5 is above .*=4"):
        config.with_iterations(16)
