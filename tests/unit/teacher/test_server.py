"""The teacher section reaches the client of its server; refusals as a user sees them: tests/unit/cli/test_mistakes."""

import json
import logging
from pathlib import Path

import pytest

from megatron_gkd.config import ConfigError, ServerTeacherConfig
from megatron_gkd.teacher import server


def write_model(folder, **sizes):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "any", "vocab_size": 77, **sizes}))
    return folder


@pytest.fixture
def section(tmp_path):
    return ServerTeacherConfig(
        hf=write_model(tmp_path / "Large", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32),
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
    monkeypatch.setattr(server, "TeacherClient", lambda url, **options: (url, options))
    assert server.make_teacher_client(section) == (
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
        server.make_teacher_client(section)


def test_a_server_with_a_model_of_other_sizes_is_refused_with_both_folders(section, tmp_path):
    served = write_model(tmp_path / "Small", hidden_size=1024, num_hidden_layers=28, num_attention_heads=32)
    with pytest.raises(ConfigError) as caught:
        server.require_same_model(section, served)
    message = str(caught.value)
    assert "teacher.server_ip='10.0.0.5', teacher.server_port=31000: it runs from" in message
    assert f"{served} with hidden_size=1024, num_hidden_layers=28, but teacher.hf='{section.hf}'" in message
    assert (
        f"hidden_size=4096, num_hidden_layers=36; start it with launch/serve.py --model {section.hf}"
        in message
    )


def test_a_size_that_one_folder_does_not_name_differs(section, tmp_path):
    sizes = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    served = write_model(tmp_path / "experts" / "Large", **sizes, num_experts=64)
    with pytest.raises(ConfigError, match=r"num_experts=64, but .* has num_experts=None"):
        server.require_same_model(section, served)


@pytest.mark.parametrize(
    ("folder", "is_warned_of"),
    [("/elsewhere/Large", False), ("Org/Large", False), ("/elsewhere/Small", True)],
)
def test_a_folder_that_is_not_seen_here_is_judged_by_its_name(section, caplog, folder, is_warned_of):
    with caplog.at_level(logging.WARNING):
        server.require_same_model(section, Path(folder))
    assert ("its files are not seen from here" in caplog.text) == is_warned_of


def test_another_folder_with_equal_sizes_is_warned_of(section, tmp_path, caplog):
    served = write_model(tmp_path / "Base", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32)
    with caplog.at_level(logging.WARNING):
        server.require_same_model(section, section.hf)
        assert not caplog.messages
        server.require_same_model(section, served)
    (message,) = caplog.messages
    assert f"runs from {served}, and teacher.hf is {section.hf}; their sizes are equal" in message
