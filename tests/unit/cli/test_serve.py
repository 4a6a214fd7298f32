"""The serve command around a stand-in for the server; with real SGLang: tests/e2e/test_sglang_server.py."""

import os
import signal

import pytest

from megatron_gkd.cli import serve
from megatron_gkd.serving import EngineDied
from tests.support.run_config import write_run_config


class StandIn:
    url = "http://127.0.0.1:1234"

    def __init__(self, check_alive):
        self.check_alive, self.is_stopped = check_alive, False

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.is_stopped = True


@pytest.fixture(autouse=True)
def _signals_are_put_back():
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(serve, "POLL_S", 0.01)

    def run(check_alive, *options):
        server, started = StandIn(check_alive), []
        monkeypatch.setattr(
            serve.ServerProcess, "start", lambda settings, **more: started.append(settings) or server
        )
        code = serve.main(["--model", str(tmp_path), "--device", "cpu", *options])
        return code, server, started

    return run


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_and_is_a_success(run, capsys, signum):
    code, server, (settings,) = run(lambda: os.kill(os.getpid(), signum), "--tp", "2")
    assert (code, server.is_stopped) == (0, True)
    assert capsys.readouterr().out == "http://127.0.0.1:1234\n"
    assert (settings.on_cpu, settings.tp_size, settings.dtype) == (True, 2, "float32")


def test_a_server_that_dies_is_a_failure(run):
    def die():
        raise EngineDied("exit code 1")

    code, server, _ = run(die)
    assert (code, server.is_stopped) == (1, True)


def test_an_open_port_without_a_key_is_refused(run, capsys, monkeypatch):
    code, _, started = run(lambda: None, "--host", "0.0.0.0")
    assert (code, started) == (2, [])
    assert "API key" in capsys.readouterr().err
    code, _, started = run(lambda: None, "--host", "0.0.0.0", "--api-key-env", "NO_SUCH_VARIABLE")
    assert (code, started) == (2, [])
    monkeypatch.setenv("A_KEY", "secret")
    code, _, (settings,) = run(
        lambda: os.kill(os.getpid(), signal.SIGTERM), "--host", "0.0.0.0", "--api-key-env", "A_KEY"
    )
    assert (code, settings.api_key) == (0, "secret")


def test_the_environment_of_the_run_is_the_servers(run, tmp_path, monkeypatch):
    config = write_run_config(tmp_path / "run_files", runtime={"env_vars": {"A": "{process}", "B": 1}})
    monkeypatch.setenv("B", "2")
    log_file = tmp_path / "teacher.log"
    stop = ["--config", str(config), "--log-file", str(log_file)]
    code, _, (settings,) = run(lambda: os.kill(os.getpid(), signal.SIGTERM), *stop)
    assert (code, settings.environment) == (0, {"A": "teacher"})
    code, _, started = run(lambda: None, "--config", str(tmp_path / "nowhere.yaml"))
    assert (code, started) == (2, [])
