"""One real SGLang server for the whole session."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_gkd.platform.device import detect_platform
from megatron_gkd.serving import ServerProcess, ServerSettings
from tests.support.processes import running
from tests.support.tiny_models import write_tiny_model

CONTEXT_LENGTH = 128
START_TIMEOUT_S = 240.0


@pytest.fixture(scope="session")
def sglang_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama that ``sglang_server`` is started with."""
    return write_tiny_model(tmp_path_factory.mktemp("sglang") / "model")


@pytest.fixture(scope="session")
def sglang_server(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Real SGLang over ``sglang_model``, fp32; who changes its weights puts them back as version 0."""
    settings = ServerSettings(
        sglang_model,
        CONTEXT_LENGTH,
        dtype="float32",
        on_cpu=detect_platform().is_cpu,
        num_threads=1,
    )
    log_file = tmp_path_factory.mktemp("sglang_log") / "server.log"
    with ServerProcess.start(settings, log_file=log_file, start_timeout_s=START_TIMEOUT_S) as server:
        processes = server_processes(server)
        yield server
    assert not running(processes), "stopping the server left processes behind"


def server_processes(server: ServerProcess) -> list[psutil.Process]:
    """The guard and all processes of the server."""
    guard = psutil.Process(server.pid)
    return [guard, *guard.children(recursive=True)]
