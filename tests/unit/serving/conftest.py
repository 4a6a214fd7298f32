"""A scripted HTTP server that injects the faults a real one cannot be asked for; real SGLang is in tests/e2e."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_gkd.serving import SglangClient, connection

VOCAB_SIZE = 50


def answer(ids: list[int], *, reason: Any = None, versions: tuple[str, ...] = ("3",)) -> dict[str, Any]:
    """One entry of a reply of /generate."""
    edges = [len(ids) * i // len(versions) for i in range(len(versions) + 1)]
    spans = [{"version": v, "start": edges[i], "end": edges[i + 1]} for i, v in enumerate(versions)]
    reason = reason or {"type": "length", "length": len(ids)}
    return {"output_ids": ids, "meta_info": {"finish_reason": reason, "weight_versions": spans}}


class FaultyServer:
    """Answers each request to a path with the next step of its script; the last step repeats.

    A step is (status, JSON-able body or raw bytes), or a function () -> such a pair, which finds the body of the request
    that it answers in ``asked.body``.
    """

    def __init__(self):
        self.scripts: dict[str, list[Any]] = {}
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.asked = threading.local()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.asked.body = body = json.loads(data) if data else None
                outer.requests.append((self.path, body, dict(self.headers)))
                script = outer.scripts[self.path]
                step = script.pop(0) if len(script) > 1 else script[0]
                status, content = step() if callable(step) else step
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.01), daemon=True).start()

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body, _ in self.requests if asked == path]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(connection, "WATCH_INTERVAL_S", 0.02)


@pytest.fixture
def faulty() -> Iterator[FaultyServer]:
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def make_client(faulty: FaultyServer) -> Callable[..., SglangClient]:
    def make(**changes: Any) -> SglangClient:
        settings: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "request_timeout_s": 5.0,
            "max_retries": 2,
            "weight_version": 3,
        }
        return SglangClient(faulty.url, **{**settings, **changes})

    return make
