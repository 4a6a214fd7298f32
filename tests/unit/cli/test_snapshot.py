"""What of the code a job gets."""

from pathlib import Path, PurePath

import pytest

from megatron_gkd.cli import submit
from megatron_gkd.cli.submit import copy_code, is_excluded


@pytest.mark.parametrize(
    ("pattern", "path", "is_folder", "expected"),
    [
        (".git/", ".git", True, True),
        (".git/", "sub/.git", True, True),
        (".git/", ".git", False, False),
        ("/runs/", "runs", True, True),
        ("/runs/", "tools/runs", True, False),
        ("/docs/big", "docs/big", False, True),
        ("*.egg-info/", "megatron_gkd.egg-info", True, True),
        ("*.pt", "a/b.pt", False, True),
        ("*.pt", "a/b.py", False, False),
    ],
)
def test_a_pattern_means_what_gitignore_means_by_it(pattern, path, is_folder, expected):
    assert is_excluded(PurePath(path), is_folder=is_folder, patterns=(pattern,)) is expected


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_the_copy_has_the_code_and_neither_the_run_nor_what_is_excluded(tmp_path):
    source, output_dir = tmp_path / "code", tmp_path / "code" / "out"
    write(source, "a.py", "pkg/b.py", ".git/HEAD", "out/metrics.jsonl", "pkg/big.pt")
    number = copy_code(source, output_dir / "code" / "1", excludes=(".git/", "*.pt"), output_dir=output_dir)
    assert number == 2
    assert files_of(output_dir / "code" / "1") == {"a.py", "pkg/b.py"}


def test_later_edits_do_not_reach_the_copy_and_linked_folders_stay_links(tmp_path):
    source, target = tmp_path / "code", tmp_path / "copy"
    write(source, "a.py")
    write(tmp_path, "data/rows.jsonl", "other.py")
    (source / "data").symlink_to("../data")
    (source / "other.py").symlink_to("../other.py")
    copy_code(source, target, excludes=(), output_dir=tmp_path / "run")
    for file in (source / "a.py", tmp_path / "other.py"):
        file.write_text("edited")
    assert (target / "a.py").read_text() == "a.py"
    assert (target / "other.py").read_text() == "other.py"
    assert (target / "data" / "rows.jsonl").read_text() == "data/rows.jsonl"
    assert (target / "data").is_symlink()


def test_a_model_among_the_code_is_refused_by_name_and_nothing_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "MAX_BYTES", 2**20)
    write(tmp_path / "code", "a.py")
    (tmp_path / "code" / "model.safetensors").write_bytes(bytes(3 * 2**20))
    with pytest.raises(ValueError, match=r"takes 3 MiB, .*runtime\.excludes; .*model\.safetensors \(3 MiB\)"):
        copy_code(tmp_path / "code", tmp_path / "copy", excludes=(), output_dir=tmp_path / "run")
    assert not (tmp_path / "copy").exists()
