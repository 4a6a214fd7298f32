"""The tokenizer that a run used goes with its weights."""

from megatron_gkd.checkpoint.side_files import copy_side_files, replace_tokenizer


def write(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def read(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_configuration_and_tokenizer_are_copied_and_nothing_else(tmp_path):
    model = write(
        tmp_path / "model",
        config__json="c",
        tokenizer__json="t",
        model__safetensors="w",
        modeling__py="code",
        optimizer__pt="pickle",
        notes__txt="private",
    )
    copy_side_files(model, tmp_path / "out")
    replace_tokenizer(tmp_path / "out", None, None)
    assert read(tmp_path / "out") == {"config.json": "c", "tokenizer.json": "t"}


def test_another_tokenizer_replaces_the_models_own_with_nothing_left_of_it(tmp_path):
    model = write(
        tmp_path / "model", config__json="c", tokenizer__json="t", merges__txt="m", chat_template__jinja="j"
    )
    other = write(tmp_path / "other", config__json="no", tokenizer__json="T", tokenizer_config__json="C")
    copy_side_files(model, tmp_path / "out")
    replace_tokenizer(tmp_path / "out", other, "J")
    assert read(tmp_path / "out") == {
        "config.json": "c",
        "tokenizer.json": "T",
        "tokenizer_config.json": "C",
        "chat_template.jinja": "J",
    }


def test_a_sentencepiece_file_gets_the_name_that_is_looked_for(tmp_path):
    model = write(tmp_path / "model", config__json="c", tokenizer__json="t")
    (tmp_path / "my.model").write_text("sp")
    copy_side_files(model, tmp_path / "out")
    replace_tokenizer(tmp_path / "out", tmp_path / "my.model", None)
    assert read(tmp_path / "out") == {"config.json": "c", "tokenizer.model": "sp"}
