"""Every kind of file gives the same prompts, and can be read on from any row."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.data.custom import load_dataset_class
from megatron_gkd.data.prompts import RowPolicy, load_prompts
from megatron_gkd.data.row_files import Cursor, open_row_files
from megatron_gkd.data.rows import RowEncoder, RowKeys, RowLimits
from megatron_gkd.data.tokenizer import DataError

BOS, W0 = 2, 7
CHAT = [{"role": "user", "content": "w3"}]
ROWS = [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(9)]
OWN_CLASS = """
class Rows:
    def __init__(self, path):
        self.path = path
    def __iter__(self):
        for word in self.path.read_text().split():
            yield {"prompt": word, "completion": "w" + str(int(word[1:]) + 1)}
number = 3
"""


@pytest.fixture
def write(tmp_path):
    """write(kind) -> [RowFile] with ROWS."""

    def make(kind: str):
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
        else:
            path.write_text("".join(row["prompt"] + "\r\n" for row in ROWS))
        own = tmp_path / "own.py"
        own.write_text(OWN_CLASS)
        return open_row_files([path], make=load_dataset_class(f"{own}:Rows") if kind == "own" else None)

    return make


@pytest.fixture
def load(tokenizer):
    def load(files, **policy):
        return load_prompts(files, RowEncoder(tokenizer, RowLimits(8)), RowPolicy(**policy))

    return load


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "own", "txt"])
def test_all_formats_give_the_same_prompts(write, load, kind):
    prompts = load(write(kind)).prompts
    assert [p.ids for p in prompts] == [(BOS, W0 + i) for i in range(9)]
    if kind != "txt":
        assert [p.completion_ids[0] for p in prompts] == [W0 + i + 1 for i in range(9)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "own", "txt"])
def test_reading_goes_on_behind_any_row(write, kind):
    (file,) = write(kind)
    rows = list(file.read())
    assert len(rows) == 9
    for done, row in enumerate(rows, 1):
        rest = list(file.read(Cursor(*json.loads(json.dumps(row.end)))))
        assert rest == rows[done:]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "own", "txt"])
def test_fingerprint_of_a_file_changes_with_it(write, kind):
    (file,) = write(kind)
    before = file.fingerprint()
    assert file.fingerprint() == before
    file.path.write_bytes(file.path.read_bytes() + b" ")
    assert file.fingerprint() != before


def test_rows_of_several_files_carry_the_place_of_their_file(tmp_path, load):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "w0"}\n{"prompt": "w1"}\n')
    prompts = load(open_row_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]))
    assert [(p.file, p.row) for p in prompts.prompts] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_parquet_messages_with_optional_fields_are_read_and_other_columns_are_not(tmp_path, load):
    path = tmp_path / "chat.parquet"
    message = {**CHAT[0], "name": None}
    table = pyarrow.Table.from_pylist([{"prompt": [message], "label": 1}, {"prompt": [message], "label": 2}])
    pyarrow.parquet.write_table(table, path)
    prompts = load(open_row_files([path]))
    assert [p.text for p in prompts.prompts] == ["<bos><user>w3<eot><assistant>"] * 2
    assert list(next(iter(open_row_files([path])[0].read())).content) == ["prompt"]


def test_own_column_names_are_used(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "w1", "answer": "w2", "prompt": "w9"}\n')
    keys = RowKeys(prompt="question", completion="answer")
    prompts = load_prompts(
        open_row_files([path], keys), RowEncoder(tokenizer, RowLimits(8), keys), RowPolicy()
    )
    assert (prompts.prompts[0].ids, prompts.prompts[0].completion_ids[0]) == ((BOS, W0 + 1), W0 + 2)
    assert prompts.ignored_keys == ("prompt",)


def test_parquet_without_the_columns_names_those_it_has(tmp_path, load):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "w1", "answer": "w2"}]), path)
    with pytest.raises(
        DataError,
        match=r"neither the column prompt nor messages, only question, answer; set data\.prompt_key",
    ):
        load(open_row_files([path]))


def test_what_is_no_parquet_and_what_is_empty_are_named(tmp_path, load):
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet"):
        load(open_row_files([tmp_path / "rows.parquet"]))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet"
    )
    with pytest.raises(DataError, match=r"empty\.parquet has no usable prompt"):
        load(open_row_files([tmp_path / "empty.parquet"]))


def test_parquet_column_of_a_wrong_type_is_a_bad_row(tmp_path, load):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [1, 2]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:1: prompt is a int, not text or messages"):
        load(open_row_files([path]))


def test_own_class_must_give_mappings(tmp_path, load):
    (tmp_path / "rows").mkdir()
    files = open_row_files([tmp_path / "rows"], make=lambda path: [{"prompt": "w1"}, "w2"])
    assert len(load(files, max_bad_rows=1).prompts) == 1
    with pytest.raises(DataError, match=r"rows:2: data\.dataset_class yielded a str, not a mapping"):
        load(files)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/none.py:Rows", "there is no file .*none.py"),
        ("{folder}/own.py:Row", "has no Row, only Rows, number"),
        ("{folder}/own.py:number", "is a int; give a class"),
        ("no_such_module.rows:Rows", "no module 'no_such_module' on the Python path"),
        ("megatron_gkd.data.none:Rows", "no module 'megatron_gkd.data.none'"),
    ],
)
def test_own_class_that_cannot_be_found_is_named(tmp_path, name, message):
    (tmp_path / "own.py").write_text(OWN_CLASS)
    with pytest.raises(DataError, match=rf"data\.dataset_class=.*{message}"):
        load_dataset_class(name.format(folder=tmp_path))


def test_own_class_is_found_by_import_path():
    assert load_dataset_class("megatron_gkd.data.row_files:RowFile").__name__ == "RowFile"


def test_a_module_that_misses_another_one_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_dataset_class("needs_more:Rows")
