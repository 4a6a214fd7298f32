"""Tokenizer, prompts and validation rows follow the configuration, and every kind of section has its class."""

import json
from pathlib import Path

import pytest

from megatron_gkd.config import GkdConfig, load_config
from megatron_gkd.config.base import sections_of
from megatron_gkd.data.streams import MixedPrompts, PromptLoader, StreamedPrompts
from megatron_gkd.data.tokenizer import DataError
from megatron_gkd.rollout import ROLLOUTS
from megatron_gkd.teacher import TEACHERS
from megatron_gkd.train.setup import (
    build_prompts,
    build_tokenizer,
    build_validation_prompts,
    with_iterations,
)
from tests.support.run_config import write_tree
from tests.support.tiny_models import EOS_ID, TOKENIZER_SIZE, write_tiny_model


@pytest.fixture
def build(tmp_path, tiny_llama):
    """build(*overrides) -> (config, tokenizer), with the prompts a0 to a5; b.jsonl holds b0 to b2."""

    def make(*overrides: str):
        tree = {
            "student": {"hf": str(tiny_llama)},
            "teacher": {"hf": str(tiny_llama)},
            "rollout": {"kind": "megatron", "max_new_tokens": 8},
            "data": {"prompts": str(write_rows(tmp_path / "a.jsonl", "a")), "max_prompt_length": 40},
            "train": {"train_iters": 1, "global_batch_size": 4, "output_dir": str(tmp_path / "run")},
        }
        write_rows(tmp_path / "b.jsonl", "b", size=3)
        config = load_config(write_tree(tmp_path / "config.yaml", tree), overrides)
        return config, build_tokenizer(config)

    return make


def write_rows(file: Path, letter: str, size: int = 6) -> Path:
    rows = [{"prompt": f"{letter}{i}", "completion": f"{i}"} for i in range(size)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts(config, tokenizer, n: int) -> list[str]:
    return [tokenizer.decode(p.ids) for p in build_prompts(config, tokenizer).take(n)]


def two_files(tmp_path: Path) -> str:
    return f"data.prompts=[{tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}]"


def test_one_file_is_read_whole_and_several_are_one_set(build, tmp_path):
    assert isinstance(build_prompts(*build()), PromptLoader)
    every = [f"a{i}" for i in range(6)] + [f"b{i}" for i in range(3)]
    config, tokenizer = build(two_files(tmp_path), "data.shuffle=false")
    assert texts(config, tokenizer, 9) == every
    config, tokenizer = build(two_files(tmp_path))
    assert sorted(texts(config, tokenizer, 9)) == every
    assert texts(config, tokenizer, 9) != every


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_weights_mix_the_files(build, tmp_path, streaming):
    config, tokenizer = build(two_files(tmp_path), "data.weights=[1, 3]", f"data.streaming={streaming}")
    stream = build_prompts(config, tokenizer)
    assert isinstance(stream, MixedPrompts)
    assert [tokenizer.decode(p.ids)[0] for p in stream.take(40)].count("b") == 30


def test_streaming_holds_blocks_of_shuffle_rows(build):
    stream = build_prompts(*build("data.streaming=true", "data.shuffle_rows=2"))
    assert isinstance(stream, StreamedPrompts)
    assert sorted(p.row for p in stream.take(2)) == [0, 1]


def test_the_limits_of_the_configuration_reach_the_rows(build, tmp_path):
    limits = ("data.max_prompt_length=1", "data.truncation=left")
    assert sorted(texts(*build(*limits), 6)) == [f"{i}" for i in range(6)]
    with pytest.raises(DataError, match=r"completion has 2 tokens, more than rollout\.max_new_tokens=1"):
        build_prompts(*build("rollout.max_new_tokens=1", "data.overlong_prompts=error"))
    (tmp_path / "a.jsonl").unlink()
    config, tokenizer = build("gkd.lmbda=1", "rollout.max_new_tokens=1", "data.overlong_prompts=error")
    assert len(texts(config, tokenizer, 6)) == 6, "without use for completions their length is no matter"


def test_the_named_columns_are_read(build, tmp_path):
    config, tokenizer = build(
        "data.prompt_key=question", "data.completion_key=answer", "data.teacher_prompt_key=hint"
    )
    row = {"question": "q", "answer": "a", "hint": "h"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (prompt,) = build_prompts(config, tokenizer).take(1)
    decoded = [tokenizer.decode(ids) for ids in (prompt.ids, prompt.completion_ids[:-1], prompt.teacher_ids)]
    assert decoded == ["q", "a", "h"]


def test_an_own_class_reads_the_files(build, tmp_path):
    (tmp_path / "own.py").write_text(
        "def rows(path):\n    return [{'prompt': 'own', 'completion': path.name}] * 2\n"
    )
    config, tokenizer = build(f"data.dataset_class={tmp_path / 'own.py'}:rows")
    assert texts(config, tokenizer, 2) == ["own", "own"]
    config, tokenizer = build("data.dataset_class=no_such_module:Rows")
    with pytest.raises(DataError, match="no module 'no_such_module'"):
        build_prompts(config, tokenizer)


def test_a_missing_completion_names_the_key_that_needs_it(build, tmp_path):
    config, tokenizer = build(f"evaluation.files={tmp_path / 'a.jsonl'}")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(
        DataError, match=r"1 rows without completion, needed by gkd\.lmbda below 1; add it or set"
    ):
        build_prompts(config, tokenizer)
    with pytest.raises(
        DataError, match=r"1 rows without completion, needed by evaluation\.files; add it or remove"
    ):
        build_validation_prompts(config, tokenizer)


def test_validation_rows_come_from_the_start_of_their_files(build, tmp_path):
    assert build_validation_prompts(*build()) == ()
    held_out = write_rows(tmp_path / "v.jsonl", "v")
    config, tokenizer = build(f"evaluation.files={held_out}", "evaluation.num_rows=2", "gkd.lmbda=1")
    prompts = build_validation_prompts(config, tokenizer)
    assert [tokenizer.decode(p.ids) for p in prompts] == ["v0", "v1"]
    assert prompts[0].completion_ids[-1] == EOS_ID
    config, tokenizer = build(f"evaluation.files={held_out}")
    assert len(build_validation_prompts(config, tokenizer)) == 6


def test_tokenizer_and_template_of_the_configuration_are_used(build, tmp_path):
    other = write_tiny_model(tmp_path / "other", hidden_size=8, num_layers=1, num_heads=1, num_groups=1)
    (tmp_path / "t.jinja").write_text("T")
    _, tokenizer = build(f"data.tokenizer={other}", f"data.chat_template={tmp_path / 't.jinja'}")
    assert tokenizer.folder == other
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "T"
    assert build()[1].render_chat([{"role": "user", "content": "x"}]) == "<user>x<eos><assistant>"


def test_a_tokenizer_with_more_ids_than_the_student_has_rows_is_refused(build, tiny_llama, tmp_path):
    config, _ = build()
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    for file in tiny_llama.iterdir():
        (smaller / file.name).symlink_to(file)
    (smaller / "config.json").unlink()
    sizes = json.loads((tiny_llama / "config.json").read_text()) | {"vocab_size": 100}
    (smaller / "config.json").write_text(json.dumps(sizes))
    student = config.student.model_copy(update={"hf": smaller})
    with pytest.raises(
        DataError, match=rf"has {TOKENIZER_SIZE} ids, but the student .* only 100 rows.*data\.tokenizer"
    ):
        build_tokenizer(config.model_copy(update={"student": student}))


def test_epochs_become_iterations_before_anything_that_depends_on_their_number(build):
    config, tokenizer = build("train.train_iters=0", "train.epochs=2")
    assert with_iterations(config, tokenizer).train.train_iters == 3, "2 x 6 prompts in batches of 4"
    config, tokenizer = build()
    assert with_iterations(config, tokenizer) is config


def test_every_kind_of_teacher_and_engine_can_be_built():
    for name, classes in (("teacher", TEACHERS), ("rollout", ROLLOUTS)):
        assert set(sections_of(GkdConfig.model_fields[name]).values()) == classes.keys()
        for cls in classes.values():
            assert "build" in vars(cls), f"{cls.__name__} does not build itself"
