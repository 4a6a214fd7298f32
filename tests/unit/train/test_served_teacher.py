"""The teacher section reaches the client of its server; refusals as a user sees them: tests/unit/cli/test_mistakes."""

import json

import pytest

from megatron_gkd.config import ConfigError, ServerTeacherConfig
from megatron_gkd.train import served_teacher


@pytest.fixture
def section(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "vocab_size": 77}))
    return ServerTeacherConfig(
        hf=tmp_path,
        server_ip="10.0.0.5",
        server_port=31000,
        api_key_env="TEACHER_KEY",
        top_k=9,
        requests_in_flight=3,
        request_timeout_s=12.0,
        max_retries=4,
    )


def test_every_key_reaches_the_client_and_the_api_key_comes_from_the_environment(section, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret")
    monkeypatch.setattr(served_teacher, "TeacherClient", lambda url, **options: (url, options))
    assert served_teacher.make_teacher_client(section) == (
        "http://10.0.0.5:31000",
        {
            "vocab_size": 77,
            "top_k": 9,
            "requests_in_flight": 3,
            "request_timeout_s": 12.0,
            "max_retries": 4,
            "api_key": "secret",
        },
    )


def test_a_key_that_is_not_in_the_environment_is_refused(section, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env='TEACHER_KEY'"):
        served_teacher.make_teacher_client(section)
