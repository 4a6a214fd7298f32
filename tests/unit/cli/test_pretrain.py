"""What the training command does before torch is imported. A whole run: tests/e2e/test_training.py."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.launching import write_run_config

ROOT = Path(__file__).parents[3]

SHOW_ENVIRONMENT_AT_IMPORT_OF_TORCH = """
import os, runpy, sys

class Show:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("A_FILE"), os.environ.get("OF_USER"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Show())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_environment_is_set_before_torch_is_imported(tmp_path):
    env_vars = {"A_FILE": "{output_dir}/dumps/{process}", "OF_USER": "config"}
    config = write_run_config(tmp_path, runtime={"env_vars": env_vars})
    script = str(ROOT / "launch" / "pretrain_gkd.py")
    result = subprocess.run(
        [sys.executable, "-c", SHOW_ENVIRONMENT_AT_IMPORT_OF_TORCH, script, "--config", str(config)],
        env={**os.environ, "OF_USER": "shell", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"{tmp_path}/run/dumps/rank_0 shell\n", result.stderr
    assert (tmp_path / "run" / "dumps").is_dir()
