"""Lifecycle of an SGLang server process: launch, health, liveness, stop."""

import json
import logging
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from megatron_gkd.serving import guard
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.command import (
    ServerSettings,
    available_cpus,
    check_cpu_plugin,
    server_command,
    server_environment,
)
from megatron_gkd.serving.connection import Connection
from megatron_gkd.serving.errors import EngineDied, EngineError, EngineTimeout

log = logging.getLogger(__name__)

NUM_TAIL_LINES = 20
TAIL_BYTES = 200_000
# nanobind reports leaked objects at every exit; the lines would push the traceback out of the tail.
EXIT_NOISE = ("nanobind: ", " - leaked ", " - ... skipped", "See https://nanobind")
STOP_GRACE_S = 10.0
HEALTH_TIMEOUT_S = 10.0
PROGRESS_INTERVAL_S = 15.0
# Below Linux' ephemeral range (from 32768 on), where an outgoing connection could take the port while the server loads.
PORTS = range(20_000, 32_000)


class ServerProcess:
    """A running server, stopped on exit of the context and with this process.

    Use it as a context manager or call ``stop``. If this process is killed, the guard ends the server.
    """

    def __init__(
        self, guard_process: subprocess.Popen, settings: ServerSettings, log_file: Path, key_file: Path | None
    ):
        self.settings = settings
        self.log_file = log_file
        self._guard = guard_process
        self._key_file = key_file

    @classmethod
    def start(cls, settings: ServerSettings, *, log_file: Path, start_timeout_s: float) -> "ServerProcess":
        """Start a server and wait until it is healthy.

        Args:
            settings: Settings of the server; port 0 is replaced by a free one.
            log_file: Receives the server's output, appended.
            start_timeout_s: Maximum wait.

        Raises:
            RuntimeError: The CPU plugin is not installed.
            EngineDied: The server ended during start-up; the message has the end of its log.
            EngineTimeout: It was not healthy in time and has been stopped.
        """
        server = cls.launch(settings, log_file=log_file)
        try:
            server.wait_until_healthy(start_timeout_s)
        except BaseException:
            server.stop()
            raise
        return server

    @classmethod
    def launch(cls, settings: ServerSettings, *, log_file: Path) -> "ServerProcess":
        """Start a server without waiting; call ``wait_until_healthy`` before the first request.

        Args:
            settings: Settings of the server; port 0 is replaced by a free one.
            log_file: Receives the server's output, appended.

        Raises:
            RuntimeError: The CPU plugin is not installed.
        """
        if settings.on_cpu:
            check_cpu_plugin()
        settings = settings if settings.port else replace(settings, port=find_free_port())
        log_file.parent.mkdir(parents=True, exist_ok=True)
        key_file = _write_key(settings.api_key) if settings.api_key else None
        command = server_command(settings, key_file)
        log.info("Starting SGLang at %s, log in %s", settings.url, log_file)
        log.debug("Command: %s", shlex.join(command))
        with log_file.open("ab") as output:
            if settings.api_key:
                os.fchmod(output.fileno(), 0o600)  # SGLang logs its settings, the key included
            # -I -S: neither PYTHONPATH nor site-packages; the guard uses the standard library only.
            guard_process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(STOP_GRACE_S), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(settings, os.environ, available_cpus()),
                # Ctrl-C in a terminal must reach the trainer only, which stops the server after its last request.
                start_new_session=True,
            )
        return cls(guard_process, settings, log_file, key_file)

    @property
    def url(self) -> str:
        """URL for clients on this machine."""
        return self.settings.url

    @property
    def pid(self) -> int:
        """Process id of the guard, the parent of the server."""
        return self._guard.pid

    def client(self, *, vocab_size: int, request_timeout_s: float, max_retries: int) -> SglangClient:
        """Return a client that raises ``EngineDied`` when this server ends."""
        return SglangClient(
            self.url,
            vocab_size=vocab_size,
            request_timeout_s=request_timeout_s,
            max_retries=max_retries,
            api_key=self.settings.api_key,
            is_alive=self.check_alive,
            weight_version=None if self.settings.has_random_weights else self.settings.weight_version,
        )

    def check_alive(self) -> None:
        """Raise ``EngineDied`` with the end of the log if the server process has ended."""
        code = self._guard.poll()
        if code is not None:
            raise EngineDied(
                f"the SGLang server at {self.url} ended with exit code {code}; the last lines of {self.log_file}:\n"
                + "\n".join(self.log_tail())
            )

    def log_tail(self, num_lines: int = NUM_TAIL_LINES) -> list[str]:
        """Return the last lines of the server's log, without the exit noise of libraries."""
        with self.log_file.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return [line for line in lines if line.strip() and not line.startswith(EXIT_NOISE)][-num_lines:]

    def stop(self) -> None:
        """Stop the server with all its processes; no-op if it has ended already."""
        self._remove_key_file()
        if self._guard.poll() is not None:
            return
        self._guard.terminate()
        try:
            self._guard.wait(STOP_GRACE_S + guard.KILL_TIMEOUT_S + 5)
        except subprocess.TimeoutExpired:
            log.warning("The guard of the SGLang server at %s did not exit; killing it", self.url)
            self._guard.kill()  # the kernel then kills the server (PR_SET_PDEATHSIG)
            self._guard.wait()
        log.info("Stopped the SGLang server at %s", self.url)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Wait until the server has generated its first token, and log the progress.

        Raises:
            EngineDied: The server ended; the message has the end of its log.
            EngineTimeout: It was not healthy in time; it is still running.
        """
        # /health generates one token, so a positive answer covers the scheduler and the model. It needs no API key.
        connection = Connection(
            self.url, request_timeout_s=HEALTH_TIMEOUT_S, max_retries=0, is_alive=self.check_alive
        )
        start = time.monotonic()
        next_progress_s = PROGRESS_INTERVAL_S
        while True:
            try:
                connection.get("/health", is_json=False)
            except EngineDied:
                raise
            except EngineError as error:
                elapsed_s = time.monotonic() - start
                if elapsed_s > timeout_s:
                    raise EngineTimeout(
                        f"the SGLang server was not healthy within {timeout_s:g} s ({error}); raise "
                        f"rollout.start_timeout_s if it only needs longer. The last lines of {self.log_file}:\n"
                        + "\n".join(self.log_tail())
                    ) from error
                if elapsed_s > next_progress_s:
                    next_progress_s += PROGRESS_INTERVAL_S
                    last_line = "".join(self.log_tail(1))
                    log.info(
                        "Waiting for SGLang, %.0f of %.0f s; last log line: %s",
                        elapsed_s,
                        timeout_s,
                        last_line,
                    )
            else:
                log.info("SGLang is ready at %s after %.1f s", self.url, time.monotonic() - start)
                self._remove_key_file()  # read by now
                return

    def _remove_key_file(self) -> None:
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)


def find_free_port() -> int:
    """Return a random TCP port that is not in use."""
    chooser = random.SystemRandom()  # not the training seed: two jobs would choose the same
    for port in chooser.sample(PORTS, 100):
        if is_free_port("127.0.0.1", port):
            return port
    raise EngineError(f"no free TCP port among 100 tried from {PORTS.start} to {PORTS.stop}")


def is_free_port(host: str, port: int) -> bool:
    """Return whether a server can bind this port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: connections in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _write_key(api_key: str) -> Path:
    # mkstemp creates the file with mode 0600. SGLang reads YAML, of which JSON is a subset.
    descriptor, name = tempfile.mkstemp(prefix="sglang-", suffix=".yaml")
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({"api-key": api_key}, file)
    return Path(name)
