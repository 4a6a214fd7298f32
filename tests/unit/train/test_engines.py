"""What the owner of the engine does before any server; the rest: tests/e2e/test_training.py."""

import pytest

from megatron_gkd.config import ConfigError, MegatronRolloutConfig, SglangRolloutConfig
from megatron_gkd.train.engines import api_key_of


def external(api_key_env):
    return SglangRolloutConfig(placement="external", urls=("http://a:1",), api_key_env=api_key_env)


def test_the_key_of_external_servers_comes_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    assert api_key_of(external("A_KEY")) == "secret"
    assert api_key_of(external(None)) is None
    assert api_key_of(MegatronRolloutConfig()) is None


@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_key_is_refused_by_name(monkeypatch, value):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(
        ConfigError, match=r"rollout\.api_key_env='A_KEY': this environment variable is not set"
    ):
        api_key_of(external("A_KEY"))
