"""JSON over HTTP to one server, with a deadline, bounded retries and a liveness check.

``requests`` is synchronous like its callers, and already a dependency of SGLang.
"""

import ipaddress
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests

from megatron_gkd.config import ConfigError
from megatron_gkd.serving.errors import EngineError, EngineReplyInvalid, EngineTimeout

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
WATCH_INTERVAL_S = 0.25
FIRST_BACKOFF_S = 0.5  # doubled after every failure
MAX_REPLY_BYTES = 1 << 30  # top-1024 log-probs of 32,768 tokens take 358 MB: 8 bytes per entry, in base64


class _Unreachable(Exception):
    """A failed attempt that may be retried."""


@dataclass
class _Attempt:
    """Result of one attempt, filled in by its thread."""

    done: threading.Event = field(default_factory=threading.Event)
    status: int = 0
    body: bytes = b""
    error: Exception | None = None


class Connection:
    """Sends requests to one server.

    Args:
        url: Such as ``http://127.0.0.1:30000``.
        request_timeout_s: Timeout of one attempt, from connecting to the last byte of the reply.
        max_retries: Retries after a failed connection or a 5xx status. Timeouts are not retried.
        api_key: Sent as bearer token.
        is_alive: Polled while waiting; raises when the server's process has ended.

    Raises:
        ValueError: ``url`` does not have this form.
    """

    def __init__(
        self,
        url: str,
        *,
        request_timeout_s: float,
        max_retries: int,
        api_key: str | None = None,
        is_alive: Callable[[], None] | None = None,
    ):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"url {url!r} is not of the form http://host:port")
        if api_key and urlsplit(url).scheme == "http" and not is_loopback(urlsplit(url).hostname or ""):
            log.warning("The API key for %s is sent unencrypted; use https outside a trusted network", url)
        self.url = url.rstrip("/")
        self._timeout_s = request_timeout_s
        self._max_retries = max_retries
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._is_alive = is_alive or (lambda: None)

    def get(self, path: str, *, timeout_s: float | None = None, is_json: bool = True) -> Any:
        """Send a GET request; see ``post``."""
        return self._request("GET", path, None, timeout_s, is_json)

    def post(self, path: str, body: Any, *, timeout_s: float | None = None, is_json: bool = True) -> Any:
        """Send a POST request; return decoded JSON, or text if ``is_json`` is False.

        Failed attempts are retried, so the request must be idempotent.

        Raises:
            EngineDied: The server's process has ended.
            EngineTimeout: No reply within the timeout.
            EngineReplyInvalid: A status other than 200 and 5xx, or a reply that is not JSON.
            EngineError: Unreachable or 5xx after the last retry.
        """
        return self._request("POST", path, body, timeout_s, is_json)

    def _request(self, method: str, path: str, body: Any, timeout_s: float | None, is_json: bool) -> Any:
        self._is_alive()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        for num_failures in range(1, self._max_retries + 2):
            try:
                reply = self._try_once(method, path, body, timeout_s)
                return (
                    _decode_json(f"{method} {self.url}{path}", reply)
                    if is_json
                    else reply.decode("utf-8", "replace")
                )
            except _Unreachable as failure:
                self._back_off(FIRST_BACKOFF_S * 2 ** (num_failures - 1))
                if num_failures > self._max_retries:
                    raise EngineError(
                        f"{method} {self.url}{path} failed {num_failures} times, last with: {failure}; is the server up "
                        "and the url right?"
                    ) from failure
                log.warning("%s %s%s failed (%s), retrying", method, self.url, path, failure)
        raise AssertionError("unreachable: the loop returns or raises")

    def _try_once(self, method: str, path: str, body: Any, timeout_s: float) -> bytes:
        attempt = _Attempt()
        # In a thread, so that the death of the server's process ends the wait: with the timeout of requests alone, up
        # to request_timeout_s would pass. A daemon: a thread blocked in a read must not keep the trainer alive.
        threading.Thread(
            target=self._send, args=(attempt, method, path, body, timeout_s), daemon=True
        ).start()
        # requests' own timeout restarts with every chunk; a server that drips bytes never exceeds it.
        deadline = time.monotonic() + timeout_s
        while not attempt.done.wait(WATCH_INTERVAL_S):
            self._is_alive()
            if time.monotonic() > deadline:
                raise EngineTimeout(self._timeout_message(method, path, timeout_s))
        if isinstance(attempt.error, requests.Timeout):
            raise EngineTimeout(self._timeout_message(method, path, timeout_s))
        if isinstance(attempt.error, requests.RequestException):
            raise _Unreachable(f"{type(attempt.error).__name__}: {attempt.error}")
        if attempt.error is not None:
            raise attempt.error
        if attempt.status >= 500:
            raise _Unreachable(f"status {attempt.status}: {_excerpt(attempt.body)}")
        if attempt.status != 200:
            raise EngineReplyInvalid(
                f"{method} {self.url}{path} was rejected with status {attempt.status}: {_excerpt(attempt.body)}"
            )
        return attempt.body

    def _send(self, attempt: _Attempt, method: str, path: str, body: Any, timeout_s: float) -> None:
        try:
            # A connection per attempt: a kept-alive one that the server has closed meanwhile looks like a failure.
            with requests.Session() as session:
                session.trust_env = False  # no proxy from the environment between trainer and engine
                with session.request(
                    method,
                    self.url + path,
                    json=body,
                    headers=self._headers,
                    timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
                    allow_redirects=False,  # would send prompts and the API key elsewhere
                    stream=True,
                ) as response:
                    attempt.body = _read_body(response)
                    attempt.status = response.status_code
        except Exception as error:  # raised in the waiting thread
            attempt.error = error
        finally:
            attempt.done.set()

    def _back_off(self, seconds: float) -> None:
        # A refused connection often means that the process has died; that is reported before the next attempt.
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, WATCH_INTERVAL_S))
            self._is_alive()

    def _timeout_message(self, method: str, path: str, timeout_s: float) -> str:
        return f"{method} {self.url}{path} had no reply within {timeout_s:g} s; raise request_timeout_s for large requests"


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_body(response: requests.Response) -> bytes:
    chunks, size = [], 0
    for chunk in response.iter_content(1 << 20):
        size += len(chunk)
        if size > MAX_REPLY_BYTES:
            raise EngineReplyInvalid(f"{response.url} answered more than {MAX_REPLY_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _decode_json(request: str, body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise EngineReplyInvalid(f"{request} did not answer JSON ({error}): {_excerpt(body)}") from error


def _excerpt(body: bytes) -> str:
    return body[:500].decode("utf-8", "replace")


def read_api_key(setting: str, variable: str | None) -> str | None:
    """The API key of a server from the environment; ``None`` if none is configured.

    Args:
        setting: Dotted key of the configuration, for the message.
        variable: Its value, the name of an environment variable.

    Raises:
        ConfigError: The variable is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(
            f"{setting}={variable!r}: this environment variable is not set; export it before the start, or set the key to "
            "null for servers without a key"
        )
    return os.environ[variable]
