"""Serve a Hugging Face model with SGLang in the foreground, with the trainer's server settings."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_gkd.cli import run_tool
from megatron_gkd.config import load_config
from megatron_gkd.platform.environment import Environment, Placeholders
from megatron_gkd.serving.command import ServerSettings
from megatron_gkd.serving.process import ServerProcess, is_free_port

POLL_S = 0.5


class _Stop(Exception):
    """SIGINT or SIGTERM was received."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server, print its URL and wait for a signal; return the exit code."""
    options = _parser().parse_args(arguments)
    # an exception, so that ServerProcess.__exit__ ends SGLang's processes also if a signal arrives while they start
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _raise_stop)
    return run_tool(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    try:
        with ServerProcess.start(
            _settings(options), log_file=options.log_file, start_timeout_s=options.start_timeout_s
        ) as server:
            sys.stdout.write(f"{server.url}\n")
            sys.stdout.flush()
            while True:
                time.sleep(POLL_S)
                server.check_alive()
    except _Stop:  # a planned end: exit code 0
        return


def _settings(options: argparse.Namespace) -> ServerSettings:
    on_cpu = options.device == "cpu" or (options.device == "auto" and _has_no_gpu())
    api_key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not api_key:
        raise ValueError(
            f"set the environment variable {options.api_key_env}: --api-key-env names it, and it is not set"
        )
    if options.port and not is_free_port(options.host, options.port):
        raise ValueError(
            f"--port {options.port} is in use on {options.host}; choose another, or omit it for a free one"
        )
    return ServerSettings(
        model_folder=options.model,
        context_length=options.context_length,
        port=options.port,
        host=options.host,
        tp_size=options.tp,
        dtype=options.dtype or ("float32" if on_cpu else "bfloat16"),
        max_running_requests=options.max_running_requests,
        mem_fraction_static=options.mem_fraction_static,
        num_threads=options.num_threads,
        on_cpu=on_cpu,
        api_key=api_key,
        environment=_environment(options),
        extra_args=tuple(options.extra),
    )


def _environment(options: argparse.Namespace) -> Mapping[str, str]:
    """Variables of ``runtime.env_vars`` for the server's process."""
    if not options.config:
        return {}
    config = load_config(options.config)
    placeholders = Placeholders(config.train.output_dir, options.log_file.stem)
    environment = Environment.of(config.runtime.env_vars, placeholders)
    environment.make_folders()
    environment.report()
    return environment.values


def _has_no_gpu() -> bool:
    from megatron_gkd.platform.device import detect_platform

    return detect_platform().is_cpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with config.json and safetensors files"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="configuration of the run that uses the server, for runtime.env_vars",
    )
    parser.add_argument("--host", default="127.0.0.1", help="any other host needs --api-key-env")
    parser.add_argument("--port", type=int, default=0, help="0 (default): a free port")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the server (default 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16"
    )
    parser.add_argument("--context-length", type=int, default=2048, help="prompt plus completion, in tokens")
    parser.add_argument("--max-running-requests", type=int, default=16, help="maximum batch size")
    parser.add_argument(
        "--mem-fraction-static",
        type=float,
        default=0.8,
        help="fraction of GPU memory for weights and KV cache",
    )
    parser.add_argument("--num-threads", type=int, help="CPU threads per rank; default: all cores")
    parser.add_argument("--log-file", type=Path, default=Path("sglang.log"), help="output of the server")
    parser.add_argument("--start-timeout-s", type=float, default=600.0)
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the API key")
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="all further arguments are passed to SGLang"
    )
    return parser


def _raise_stop(signum: int, frame: object) -> None:
    raise _Stop
