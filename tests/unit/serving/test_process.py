"""Starting and losing a server, with commands that stand for SGLang. The real one: tests/e2e/test_sglang_server.py."""

import logging
import socket
import sys
import time

import pytest

from megatron_gkd.serving import EngineDied, EngineTimeout, ServerProcess, ServerSettings, process
from megatron_gkd.serving.process import PORTS, find_free_port

# answers /health and nothing else
HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def run(code: str, **arguments) -> ServerProcess:
        monkeypatch.setattr(
            process,
            "server_command",
            lambda settings, key_file: [sys.executable, "-c", code, str(settings.port)],
        )
        settings = ServerSettings(tmp_path, 64)
        return ServerProcess.start(
            settings, log_file=tmp_path / "logs" / "server.log", **{"start_timeout_s": 20, **arguments}
        )

    return run


def test_a_server_is_up_when_it_answers_and_gone_after_the_block(start):
    with start(HEALTHY) as server:
        server.check_alive()
        assert server.url == f"http://127.0.0.1:{server.settings.port}"
    with pytest.raises(EngineDied):
        server.check_alive()
    server.stop()  # twice is harmless


@pytest.mark.parametrize(("has_random_weights", "expected"), [(True, None), (False, 0)])
def test_clients_of_a_server_with_random_weights_insist_on_a_push(
    start, tmp_path, has_random_weights, expected
):
    with start(HEALTHY) as server:
        server.settings = ServerSettings(tmp_path, 64, has_random_weights=has_random_weights)
        client = server.client(vocab_size=9, request_timeout_s=1, max_retries=0)
        assert client.weight_version == expected


def test_a_server_that_dies_at_the_start_is_reported_at_once_with_its_log_tail(start):
    code = "import sys; [print(f'line {i}') for i in range(30)]; print('nanobind: leaked 5 types!'); sys.exit('no memory')"
    begin = time.monotonic()
    with pytest.raises(EngineDied, match=r"exit code 1(.|\n)*line 29\n(.|\n)*no memory") as caught:
        start(code)
    assert time.monotonic() - begin < 5
    assert "line 5\n" not in str(caught.value)
    assert "nanobind" not in str(caught.value)


def test_a_server_that_never_answers_times_out_and_is_stopped(start, monkeypatch, caplog):
    monkeypatch.setattr(process, "PROGRESS_INTERVAL_S", 0.1)
    caplog.set_level(logging.INFO)
    with pytest.raises(EngineTimeout, match=r"not healthy within 0\.6 s(.|\n)*start_timeout_s(.|\n)*loading"):
        start("import time; print('loading', flush=True); time.sleep(60)", start_timeout_s=0.6)
    assert "Waiting for SGLang" in caplog.text
    assert "Stopped the SGLang server" in caplog.text


def test_a_free_port_is_free_and_no_ephemeral_one():
    port = find_free_port()
    assert port in PORTS
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
