"""The configuration of tests/unit/config, and sizes that make small inputs pass through every loop."""

import pytest

from megatron_gkd.losses import vocab_parallel
from tests.unit.config.conftest import config_file, tree

__all__ = ["config_file", "tree"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Elementwise passes over one to three rows, so that every loop over pieces runs several times."""
    monkeypatch.setattr(vocab_parallel, "_ELEMENTS_PER_PIECE", 1500)
