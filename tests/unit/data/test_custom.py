"""Templates found by name. Not here: dataset classes (test_row_files, tests/unit/train/test_inputs)."""

import pytest

from megatron_gkd.data.custom import load_chat_template
from megatron_gkd.data.tokenizer import DataError


def test_a_template_is_a_file_or_a_text_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "t.jinja").write_text("of a file")
    (tmp_path / "own_templates.py").write_text('SHORT = "of a module"\nNUMBER = 1\n')
    assert load_chat_template(str(tmp_path / "t.jinja")) == "of a file"
    assert load_chat_template(f"{tmp_path / 'own_templates.py'}:SHORT") == "of a module"
    monkeypatch.syspath_prepend(tmp_path)
    assert load_chat_template("own_templates:SHORT") == "of a module"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jinja", r"data\.chat_template='.*none\.jinja' cannot be read"),
        ("none.py:TEXT", r"data\.chat_template='.*none\.py:TEXT': there is no file"),
        ("own.py:LONG", r"data\.chat_template='.*own\.py:LONG': .*own\.py has no LONG, only SHORT, NUMBER"),
        (
            "own.py:NUMBER",
            r"data\.chat_template='.*own\.py:NUMBER' is a int; give a string with a Jinja template",
        ),
    ],
)
def test_a_template_that_is_not_there_is_named(tmp_path, name, message):
    (tmp_path / "own.py").write_text('SHORT = "x"\nNUMBER = 1\n')
    with pytest.raises(DataError, match=message):
        load_chat_template(str(tmp_path / name))
