"""The configuration of tests/unit/config."""

from tests.unit.config.conftest import config_file, tree

__all__ = ["config_file", "tree"]
