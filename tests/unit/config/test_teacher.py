"""The teacher section with a server behind a port: kinds, limits, and rules against the student."""

import json

import pytest

from megatron_gkd.config import (
    ConfigError,
    MegatronTeacherConfig,
    ServerTeacherConfig,
    check_world,
    load_config,
)


@pytest.fixture
def served(tree, config_file) -> str:
    """An override that puts a server in the teacher's place; its model is one that could not be built here."""
    folder = tree["teacher"]["hf"]
    with open(f"{folder}/config.json", "w") as file:
        json.dump({"model_type": "mixture_of_everything", "vocab_size": 1003}, file)
    config_file.write_text(config_file.read_text() + "loss: {support: teacher_top_k}\n")
    return f"teacher={{kind: server, hf: {folder}, server_ip: 10.0.0.5}}"


def test_a_teacher_without_kind_is_a_megatron_model(config_file):
    assert isinstance(load_config(config_file).teacher, MegatronTeacherConfig)


def test_a_served_teacher_may_be_of_any_architecture_and_takes_no_ranks(config_file, served):
    config = load_config(config_file, [served])
    assert isinstance(config.teacher, ServerTeacherConfig)
    assert config.teacher.url == "http://10.0.0.5:30000"
    assert list(config.models) == ["student"]
    check_world(config, 8)


def test_the_address_may_be_of_the_sixth_version(config_file, served):
    config = load_config(config_file, [served, "teacher.server_ip='fd00::5'", "teacher.server_port=31000"])
    assert isinstance(config.teacher, ServerTeacherConfig)
    assert config.teacher.url == "http://[fd00::5]:31000"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.kind=vllm", "teacher.kind: must be one of megatron, server, none"),
        ("teacher.server_ip=null", r"teacher.server_ip: should be a valid string \(got None\)"),
        ("teacher.server_ip='http://10.0.0.5'", "not an address or a name.*the port has its own key"),
        ("teacher.server_port=70000", "teacher.server_port"),
        ("teacher.top_k=0", "teacher.top_k"),
        ("teacher.top_k=1004", "teacher.top_k=1004 is above the teacher's vocab_size=1003"),
        ("teacher.requests_in_flight=0", "teacher.requests_in_flight"),
        ("teacher.request_timeout_s=0", "teacher.request_timeout_s"),
        ("teacher.max_retries=-1", "teacher.max_retries"),
        ("teacher.micro_batch_size=2", "unknown key for kind server"),
        ("teacher.hf=nowhere", "teacher.hf='nowhere'.*config.json does not exist"),
        ("loss.temperature=2", r"loss.temperature=2\.0 .* set loss.teacher_temperature=1"),
        ("loss.teacher_temperature=3", r"loss.teacher_temperature=3\.0 would need"),
        ("loss.support=full", "loss.support=full needs .* set loss.support=teacher_top_k"),
        ("loss.support=union", "loss.support=union needs"),
        ("loss.teacher_logit_scale=2", r"loss.teacher_logit_scale=2\.0 .* leave them out"),
        ("loss.teacher_logit_soft_cap=30", r"loss.teacher_logit_soft_cap=30\.0 change logits"),
    ],
)
def test_a_mistake_about_a_served_teacher_is_named_with_its_fix(config_file, served, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [served, override])


def test_the_student_may_have_a_temperature_of_its_own(config_file, served):
    loss = load_config(config_file, [served, "loss.temperature=2", "loss.teacher_temperature=1"]).loss
    assert (loss.temperature, loss.teacher_temperature) == (2, 1)


def test_another_vocabulary_is_refused(config_file, served, tree):
    with open(f"{tree['teacher']['hf']}/config.json", "w") as file:
        json.dump({"model_type": "llama", "vocab_size": 1004}, file)
    with pytest.raises(ConfigError, match=r"vocab_size=1003 and the teacher .*vocab_size=1004"):
        load_config(config_file, [served])


@pytest.mark.parametrize(("num_ids", "is_fine"), [(1003, True), (1004, False)])
def test_a_served_teacher_may_have_more_rows_only_if_they_are_no_token(
    config_file, served, tree, num_ids, is_fine
):
    with open(f"{tree['teacher']['hf']}/config.json", "w") as file:
        json.dump({"model_type": "llama", "vocab_size": 1024}, file)
    with open(f"{tree['student']['hf']}/tokenizer.json", "w") as file:
        json.dump({"model": {"vocab": {f"token {i}": i for i in range(num_ids)}}}, file)
    if is_fine:
        load_config(config_file, [served])
        return
    with pytest.raises(ConfigError, match="vocab_size=1024; both must use the same vocabulary"):
        load_config(config_file, [served])


def test_a_served_model_that_does_not_say_its_vocabulary_is_refused(config_file, served, tree):
    with open(f"{tree['teacher']['hf']}/config.json", "w") as file:
        json.dump({"model_type": "llama"}, file)
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        load_config(config_file, [served])
