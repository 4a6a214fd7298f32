"""What may be imported or called where, as far as ruff and import-linter cannot see it."""

import ast

import pytest

from tests.support.processes import ROOT, run_python

PACKAGE = ROOT / "megatron_gkd"

LOAD_WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "megatron", "sglang", "transformers", "numpy"}:
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
from megatron_gkd.config import ConfigError, load_config
from megatron_gkd.config.document import DEFAULTS_FILE

try:
    load_config(DEFAULTS_FILE)
except ConfigError as error:
    assert "data.prompts: is required" in str(error)
else:
    raise SystemExit("the file of defaults has no prompts and was accepted")
"""


def test_a_configuration_is_checked_without_torch():
    result = run_python("-c", LOAD_WITHOUT_TORCH)
    assert result.returncode == 0, result.stderr


def test_only_the_platform_moves_anything_to_cuda():
    calls = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.parent != PACKAGE / "platform"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
    ]
    assert not calls, "use the device of another tensor or of the platform"


@pytest.mark.parametrize("kind", ["*.py", "*.md", "*.yaml"])
def test_sources_are_ascii(kind):
    folders = [PACKAGE, ROOT / "tests", ROOT / "configs", ROOT / "docs", ROOT / "launch", ROOT / "tools"]
    files = [file for folder in folders for file in folder.rglob(kind)]
    assert [str(file.relative_to(ROOT)) for file in files if not file.read_bytes().isascii()] == []


def test_every_package_folder_says_what_it_is_for():
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    silent = []
    for folder in sorted(folders):
        init = folder / "__init__.py"
        if not init.exists() or not ast.get_docstring(ast.parse(init.read_text())):
            silent.append(str(folder.relative_to(ROOT)))
    assert not silent, "give each folder an __init__.py with a docstring"
