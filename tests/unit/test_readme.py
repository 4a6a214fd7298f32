"""What the README shows is accepted: its YAML by the schema, its make targets by make, its commands by their parsers.

That `make quickstart` and `make test` do what it says is seen by running them; the training command itself runs in
tests/e2e/test_training.py.
"""

import re
import subprocess

import pytest
import yaml

from megatron_gkd.config import GkdConfig
from tests.support.processes import ROOT, run_python

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_configuration_in_the_readme_is_valid():
    (text,) = blocks("yaml")
    config = GkdConfig.model_validate(yaml.safe_load(text))
    assert config.loss.divergence == "jsd"
    config_keys = set(yaml.safe_load(text))
    assert {"student", "teacher", "rollout", "data", "train"} <= config_keys


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"make ([a-z]+)", README)) - {"a"}
    assert {"quickstart", "test"} <= targets
    for target in targets & set(re.findall(r"^make ([a-z]+)$", README, flags=re.MULTILINE)):
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


SCRIPTS = sorted(set(re.findall(r"python ((?:tools|launch)/\w+\.py)", README)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_that_the_readme_gives_a_script_are_known_to_it(script):
    shown = re.findall(rf"python {script}([^`\n]*)", README)
    result = run_python(script, "--help")
    assert result.returncode == 0, result.stderr
    for option in {word for line in shown for word in line.split() if word.startswith("--")}:
        assert option in result.stdout
