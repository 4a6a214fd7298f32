"""Rollout by SGLang servers: rank 0 sends the requests, every rank gets the result."""

import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from typing_extensions import override

from megatron_gkd.config import ConfigError, GkdConfig, load_hf_shapes
from megatron_gkd.config.rollout import SglangRolloutConfig
from megatron_gkd.models.gpt import ShardedModel
from megatron_gkd.parallel.collectives import broadcast_json
from megatron_gkd.parallel.groups import Layout
from megatron_gkd.platform.device import DTYPES
from megatron_gkd.platform.environment import Environment, Placeholders
from megatron_gkd.rollout.base import PushReport, RolloutContext, RolloutEngine, cut_at_stop
from megatron_gkd.rollout.weight_sync import SharedWeightFile, WeightPusher
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.command import ServerSettings, check_cpu_plugin
from megatron_gkd.serving.connection import read_api_key
from megatron_gkd.serving.errors import EngineError, error_from_json, error_to_json
from megatron_gkd.serving.process import ServerProcess
from megatron_gkd.serving.protocol import Completion, Sampling

GIB = 2**30
CHECK_TIMEOUT_S = 30.0
"""Of the requests before a run: a server that is up answers them at once."""
PROBE_TOLERANCE = {"fp32": 2e-4, "bf16": 5e-2}
"""Nats; trainer and server differ by the order of their sums, in bf16 by its rounding."""
TMPFS = Path("/dev/shm")
PUSH_COPIES = 2  # the new weights are written while the server may still map the previous ones


class Servers(Protocol):
    """The servers of a run; exists on rank 0 only."""

    def connect(self) -> list[SglangClient]:
        """One client per server, once all of them are ready."""
        ...

    def close(self) -> None:
        """Stop the servers that the run started."""
        ...


class SglangRollout(RolloutEngine):
    """Generation by one or more servers; each gets a contiguous block of the prompts in one request.

    Args:
        servers: Where to connect to; used on the leader only.
        sampling: Distribution, limits and stop tokens (the end-of-sequence tokens among them).
        stop: Strings that end a completion; the ids are cut after generation.
        decode: Text of token ids; needed with ``stop``.
        is_leader: Whether this rank sends the requests; exactly one does.
        broadcast: Sends the leader's JSON-able value to all ranks; the others' argument is ignored.
        push_base: Folder in which the weights are handed to the servers.
        probe_tolerance: Largest difference in log-probability (nats) after a weight push.
    """

    def __init__(
        self,
        servers: Servers | None,
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        is_leader: bool,
        broadcast: Callable[[Any], Any],
        push_base: Path,
        probe_tolerance: float,
    ):
        if stop and decode is None:
            raise ValueError("stop strings need a decode function")
        if "" in stop:
            raise ValueError("an empty stop string would end every completion at once")
        self._servers, self._sampling, self._stop, self._decode = servers, sampling, tuple(stop), decode
        self._is_leader, self._broadcast = is_leader, broadcast
        self._push_base, self._probe_tolerance = push_base, probe_tolerance
        self._clients: list[SglangClient] = []
        self._push_folder: Path | None = None
        self._pusher: WeightPusher | None = None

    @override
    @classmethod
    def preflight(cls, section: SglangRolloutConfig, context: RolloutContext) -> None:
        problems = list(_push_problems(context.config, section))
        if section.placement == "colocated":
            problems += _package_problems(context.job.device)
        elif context.job.is_leader:
            problems += _server_problems(section, context)
        if problems:
            raise ConfigError.listing("what the run needs on this machine", problems)

    @override
    @classmethod
    def build(cls, section: SglangRolloutConfig, context: RolloutContext) -> "SglangRollout":
        config, job = context.config, context.job
        servers: Servers | None = None
        if job.is_leader:
            is_colocated = section.placement == "colocated"
            servers = ColocatedServer(section, context) if is_colocated else ExternalServers(section, context)
        return cls(
            servers,
            context.sampling,
            stop=section.stop,
            decode=context.tokenizer.decode,
            is_leader=job.is_leader,
            broadcast=partial(broadcast_json, device=job.device),
            push_base=push_base(config, section),
            probe_tolerance=section.probe_tolerance or PROBE_TOLERANCE[config.train.precision],
        )

    @override
    def connect(self, student: ShardedModel) -> None:
        self._on_leader(self._connect_clients)  # all ranks fail alike if a server does not start
        folder = self._push_folder = self._push_base / self._broadcast(f"megatron_gkd-{secrets.token_hex(6)}")
        if self._is_leader:
            folder.mkdir(parents=True, mode=0o700)  # whoever can write there can replace the weights
        self._pusher = self._make_pusher(student, folder)

    @override
    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        if len(seeds) != len(prompts) or len(set(seeds)) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts need as many different seeds, got {len(set(seeds))} of {len(seeds)}"
            )
        values = self._on_leader(lambda: self._generate(prompts, seeds))
        return [Completion.from_json(value) for value in values]

    @override
    def push_weights(self, version: int, probe: Sequence[Sequence[int]]) -> PushReport:
        assert self._pusher is not None  # connected
        return self._pusher.push(version, probe)

    @override
    def close(self) -> None:
        if self._servers is not None:
            self._servers.close()
        if self._push_folder is not None and self._is_leader:
            shutil.rmtree(self._push_folder, ignore_errors=True)

    def _connect_clients(self) -> None:
        self._clients = self._servers.connect() if self._servers is not None else []
        if not self._clients:
            raise ValueError("the leader needs the client of at least one server")

    def _make_pusher(self, student: ShardedModel, folder: Path) -> WeightPusher:
        return WeightPusher(student, SharedWeightFile(folder, student), self._clients, self._probe_tolerance)

    def _on_leader(self, work: Callable[[], Any]) -> Any:
        """The leader's result on all ranks, or its error on all ranks."""
        outcome: dict[str, Any] | None = None
        failure: Exception | None = None
        if self._is_leader:
            try:
                outcome = {"value": work()}
            except Exception as error:  # of any kind: the other ranks already wait for the outcome
                failure = error
                outcome = {"error": error_to_json(error)}
        outcome = self._broadcast(outcome)
        assert outcome is not None
        if "error" in outcome:
            raise error_from_json(outcome["error"]) from failure
        return outcome["value"]

    def _generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Any]:
        blocks = _split(len(prompts), len(self._clients))

        def request(client: SglangClient, block: slice) -> list[Completion]:
            return client.generate(prompts[block], seeds=seeds[block], sampling=self._sampling)

        # one request per server, so that the server batches all of its prompts and every iteration repeats
        with ThreadPoolExecutor(max_workers=len(self._clients)) as threads:
            results = list(threads.map(request, self._clients, blocks))
        return [self._cut(completion).to_json() for result in results for completion in result]

    def _cut(self, completion: Completion) -> Completion:
        return completion if self._decode is None else cut_at_stop(completion, self._stop, self._decode)


class ColocatedServer:
    """A server on this machine, started at once with random weights: the first push brings the student's."""

    def __init__(self, section: SglangRolloutConfig, context: RolloutContext):
        self._section, self._vocab_size = section, context.vocab_size
        log_file = context.config.train.output_dir / "logs" / "sglang.log"
        self._server = ServerProcess.launch(
            _server_settings(section, context, log_file.stem), log_file=log_file
        )

    def connect(self) -> list[SglangClient]:
        """Wait for the server, and return its client."""
        section = self._section
        self._server.wait_until_healthy(section.start_timeout_s)
        client = self._server.client(
            vocab_size=self._vocab_size,
            request_timeout_s=section.request_timeout_s,
            max_retries=section.max_retries,
        )
        return [client]

    def close(self) -> None:
        """Stop the server."""
        self._server.stop()


class ExternalServers:
    """Servers that already run at ``rollout.urls``."""

    def __init__(self, section: SglangRolloutConfig, context: RolloutContext):
        self._section, self._context = section, context

    def connect(self) -> list[SglangClient]:
        """A client per server, after a look at the server's settings."""
        section, context = self._section, self._context
        clients = [
            SglangClient(
                url,
                vocab_size=context.vocab_size,
                request_timeout_s=section.request_timeout_s,
                max_retries=section.max_retries,
                api_key=api_key_of(section),
            )
            for url in section.urls
        ]
        for client in clients:
            client.check_settings(num_sequence_tokens=context.config.seq_length)
        return clients

    def close(self) -> None:
        """Nothing to stop: the servers belong to someone else."""


def api_key_of(section: SglangRolloutConfig) -> str | None:
    """The API key of external servers.

    Raises:
        ConfigError: The environment variable that should hold it is not set.
    """
    return read_api_key("rollout.api_key_env", section.api_key_env)


def push_base(config: GkdConfig, section: SglangRolloutConfig) -> Path:
    """Folder in which the run makes the folder of its weight pushes."""
    return section.push_dir or (TMPFS if TMPFS.is_dir() else config.train.output_dir)


def _split(num_items: int, num_blocks: int) -> list[slice]:
    """Contiguous blocks whose sizes differ by one at most, the larger ones first."""
    size, num_larger = divmod(num_items, num_blocks)
    edges = [block * size + min(block, num_larger) for block in range(num_blocks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _server_settings(section: SglangRolloutConfig, context: RolloutContext, process: str) -> ServerSettings:
    config = context.config
    environment = Environment.of(config.runtime.env_vars, Placeholders(config.train.output_dir, process))
    environment.make_folders()
    return ServerSettings(
        config.student.hf_folder,
        context_length=config.seq_length,
        max_running_requests=min(config.train.global_batch_size, 256),  # SGLang reserves memory for each
        dtype="float32" if config.train.precision == "fp32" else "bfloat16",
        on_cpu=context.job.platform.is_cpu,
        tp_size=section.tensor_model_parallel_size,
        mem_fraction_static=section.mem_fraction_static,
        num_threads=section.num_threads,
        has_random_weights=True,  # replaced by the first push, so reading the files would be wasted
        environment=environment.values,
    )


def _package_problems(device: torch.device) -> Iterator[str]:
    if find_spec("sglang") is None:
        yield (
            "rollout.kind=sglang starts an SGLang server, and the package sglang is not installed here; install it "
            "(see README) or set rollout.kind=megatron"
        )
    elif device.type == "cpu":
        try:
            check_cpu_plugin()
        except RuntimeError as error:
            yield f"rollout.kind=sglang: {error}, or set rollout.kind=megatron"


def _push_problems(config: GkdConfig, section: SglangRolloutConfig) -> Iterator[str]:
    folder = push_base(config, section)
    if section.push_dir is None and folder == config.train.output_dir:
        return  # made by the run; its space is checked together with the checkpoints'
    name = f"rollout.push_dir={str(folder)!r}" + ("" if section.push_dir else " (the default)")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield f"{name} is no folder that can be written; name one that the server sees too"
        return
    yield from _push_space_problems(config, folder, name)
    if section.push_dir is None and not _is_on_one_machine(config):
        yield (
            f"{name} is memory of one machine, and the student's ranks, which write there, are on several "
            "(student.parallel); name a folder on a file system that all of them share"
        )


def _is_on_one_machine(config: GkdConfig) -> bool:
    """Whether the ranks of the student's first copy, which is the one pushed, run on the machine of rank 0."""
    # Megatron numbers tensor-parallel ranks first and pipeline stages last, so a copy need not be on one machine
    parallel, world_size = config.student.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    layout = Layout(
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, num_ranks=world_size
    )
    last_rank = max(layout.last_stage_ranks(dp_rank=0))
    return last_rank < int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _push_space_problems(config: GkdConfig, folder: Path, name: str) -> Iterator[str]:
    parameters = load_hf_shapes(config.student.hf_folder).num_parameters
    needed = PUSH_COPIES * parameters * DTYPES[config.train.precision].itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield (
            f"{name} has {free / GIB:.2f} GiB free and {PUSH_COPIES} copies of the student's weights take "
            f"{needed / GIB:.2f} GiB; name a larger folder (containers: raise the size of /dev/shm)"
        )


def _server_problems(section: SglangRolloutConfig, context: RolloutContext) -> Iterator[str]:
    vocab_size, api_key = context.vocab_size, api_key_of(section)
    for url in section.urls:
        try:
            client = SglangClient(
                url,
                vocab_size=vocab_size,
                request_timeout_s=min(section.request_timeout_s, CHECK_TIMEOUT_S),
                max_retries=0,
                api_key=api_key,
            )
            client.check_settings(num_sequence_tokens=context.config.seq_length)
        except (EngineError, ValueError) as error:
            yield f"rollout.urls: {url}: {error}"
