"""Command line and environment of an SGLang server, as pure functions of the settings."""

import importlib.metadata
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_gkd.config.runtime import TORCHRUN_PREFIXES, TORCHRUN_VARIABLES
from megatron_gkd.platform.sglang_cpu import PLATFORM_NAME
from megatron_gkd.serving.connection import is_loopback

# sglang 0.5.23 accepts prompts of up to context length - 6 tokens, and silently shortens completions near the limit.
SPARE_CONTEXT_TOKENS = 6

# Variables of torchrun and of the trainer's libraries. An engine that inherits them joins the trainer's rendezvous, or
# runs with the trainer's number of threads.
_SCRUBBED = TORCHRUN_VARIABLES | {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_ASYNC_ERROR_HANDLING",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
        model_folder: Hugging Face folder with config.json and safetensors files.
        context_length: Maximum length of prompt plus completion in tokens.
        port: TCP port; 0: ``ServerProcess.start`` picks a free one.
        max_running_requests: Maximum number of sequences per batch; further ones are queued.
        dtype: Data type of weights and activations.
        on_cpu: Use this package's CPU platform instead of a GPU.
        host: Address to bind; anything but loopback requires an API key.
        tp_size: Tensor-parallel size of the server.
        mem_fraction_static: Fraction of GPU memory for weights and KV cache; ignored on CPU.
        num_threads: CPU threads per rank of the server; ``None`` divides the machine's cores among them.
        weight_version: Version reported until the first weight update.
        has_random_weights: Skip loading weights; clients of this server require a push before the first request.
        is_deterministic: Honour ``sampling_seed``; otherwise SGLang ignores seeds silently.
        api_key: Bearer token required from clients.
        environment: Extra environment variables.
        extra_args: Appended to SGLang's command line.
    """

    model_folder: Path
    context_length: int
    port: int = 0
    max_running_requests: int = 16
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    on_cpu: bool = False
    host: str = "127.0.0.1"
    tp_size: int = 1
    mem_fraction_static: float = 0.4
    num_threads: int | None = None
    weight_version: int = 0
    has_random_weights: bool = False
    is_deterministic: bool = True
    api_key: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    extra_args: tuple[str, ...] = ()

    def __post_init__(self):
        if not is_loopback(self.host) and not self.api_key:
            raise ValueError(
                f"host {self.host} is reachable from other machines, and any client can replace the weights; give an API "
                "key or use 127.0.0.1"
            )
        if not (self.model_folder / "config.json").is_file():
            raise ValueError(f"{self.model_folder} is not a Hugging Face model folder: it has no config.json")
        if self.api_key and "--config" in self.extra_args:
            raise ValueError(
                "SGLang takes one --config, which the API key occupies; give the settings of your file as single arguments"
            )

    @property
    def url(self) -> str:
        """URL of the server for clients on this machine."""
        host = "127.0.0.1" if _is_any_address(self.host) else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def server_command(settings: ServerSettings, key_file: Path | None = None) -> list[str]:
    """Return the command that starts the server.

    Args:
        settings: Settings of the server.
        key_file: YAML file with the API key. Not an argument: every user of the machine can read a command line.
    """
    # The trainer exchanges token ids only (no tokenizer, no grammar). An idle server without --sleep-on-idle keeps its
    # scheduler spinning: 46 % of a core, measured. Its warm-up request would use weights that are not pushed yet.
    command = [
        sys.executable, "-m", "sglang.launch_server",
        *(("--config", str(key_file)) if key_file else ()),
        "--model-path", str(settings.model_folder),
        "--host", settings.host,
        "--port", str(settings.port),
        "--tp-size", str(settings.tp_size),
        "--dtype", settings.dtype,
        "--context-length", str(settings.context_length + SPARE_CONTEXT_TOKENS),
        "--max-running-requests", str(settings.max_running_requests),
        "--weight-version", str(settings.weight_version),
        "--grammar-backend", "none",
        "--skip-server-warmup",
        "--skip-tokenizer-init",
        "--sleep-on-idle",
    ]  # fmt: skip
    if settings.has_random_weights:
        command += ["--load-format", "dummy"]
    if settings.is_deterministic:
        command.append("--enable-deterministic-inference")
    command += _cpu_arguments(settings) if settings.on_cpu else _gpu_arguments(settings)
    return [*command, *settings.extra_args]


def server_environment(
    settings: ServerSettings, inherited: Mapping[str, str], cpus: Sequence[int]
) -> dict[str, str]:
    """Return the environment of the server process.

    Args:
        settings: Settings of the server.
        inherited: The trainer's environment.
        cpus: Cores available to the server.
    """
    environment = {
        name: value
        for name, value in {**inherited, **settings.environment}.items()
        if name not in _SCRUBBED and not name.startswith(TORCHRUN_PREFIXES)
    }
    cores_of_ranks = _share_cores(cpus, settings.tp_size)
    environment["OMP_NUM_THREADS"] = str(settings.num_threads or len(cores_of_ranks[0]))
    environment["HF_HUB_OFFLINE"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    # The spare tokens may exceed the model's max_position_embeddings; no sequence is that long.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    # After a crash SGLang would wait 5 s for py-spy, and up to 60 s for CUDA core dumps, before it exits.
    environment.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")
    environment.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
    if settings.on_cpu:
        environment["SGLANG_PLATFORM"] = PLATFORM_NAME
        if settings.tp_size > 1:
            # Without explicit bindings sglang 0.5.23 asserts that there are as many NUMA nodes as ranks.
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                ",".join(str(core) for core in cores) for cores in cores_of_ranks
            )
    return environment


def check_cpu_plugin() -> None:
    """Raise ``RuntimeError`` unless SGLang can find this package's CPU platform."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="sglang.srt.platforms")}
    if PLATFORM_NAME not in names:
        raise RuntimeError(
            f"SGLang cannot find its platform {PLATFORM_NAME!r}: entry points exist only for installed packages; run "
            "pip install -e . in the repository"
        )


def available_cpus() -> list[int]:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_arguments(settings: ServerSettings) -> list[str]:
    # Enough for all running requests at full length: a retracted request is recomputed, and its batch is another one.
    num_cache_tokens = settings.max_running_requests * (settings.context_length + SPARE_CONTEXT_TOKENS)
    return [
        "--device", "cpu",
        "--attention-backend", "torch_native",
        "--sampling-backend", "pytorch",
        "--cuda-graph-backend-decode", "disabled",
        "--cuda-graph-backend-prefill", "disabled",
        "--disable-overlap-schedule",
        "--max-total-tokens", str(num_cache_tokens),
    ]  # fmt: skip


def _gpu_arguments(settings: ServerSettings) -> list[str]:
    return ["--mem-fraction-static", str(settings.mem_fraction_static)]


def _is_any_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _share_cores(cpus: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Divide the cores into contiguous blocks, one per rank; reuse cores if there are fewer."""
    if len(cpus) < num_ranks:
        return [[cpus[rank % len(cpus)]] for rank in range(num_ranks)]
    size = len(cpus) // num_ranks
    return [list(cpus[rank * size : (rank + 1) * size]) for rank in range(num_ranks)]
