"""The generation engine of a run: started early, connected once the student exists."""

import logging
import secrets
import shutil
from pathlib import Path

from megatron_gkd.config import GkdConfig
from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.config.rollout import RolloutConfig, SglangRolloutConfig
from megatron_gkd.data.tokenizer import Tokenizer
from megatron_gkd.models.lora import merged_parameters
from megatron_gkd.parallel.collectives import broadcast_json
from megatron_gkd.platform.environment import Environment, Place
from megatron_gkd.rollout.engine import RolloutEngine, Sampling
from megatron_gkd.rollout.megatron import MegatronRollout
from megatron_gkd.rollout.sglang import SglangRollout
from megatron_gkd.rollout.sync import SharedWeightFile, WeightPusher
from megatron_gkd.serving.client import SglangClient
from megatron_gkd.serving.command import ServerSettings
from megatron_gkd.serving.errors import EngineError
from megatron_gkd.serving.process import ServerProcess
from megatron_gkd.train.api_keys import read_api_key
from megatron_gkd.train.build import Student, World, log_folder
from megatron_gkd.train.probe import trainer_log_probs

log = logging.getLogger(__name__)

PROBE_TOLERANCE = {"fp32": 2e-4, "bf16": 5e-2}
TMPFS = Path("/dev/shm")


def push_base(config: GkdConfig, rollout: SglangRolloutConfig) -> Path:
    """Folder below which weights are handed to the server."""
    return rollout.push_dir or (TMPFS if TMPFS.is_dir() else config.train.output_dir)


def api_key_of(rollout: RolloutConfig) -> str | None:
    """The key of external servers.

    Raises:
        ConfigError: The variable that should hold it is not set.
    """
    variable = rollout.api_key_env if isinstance(rollout, SglangRolloutConfig) else None
    return read_api_key("rollout.api_key_env", variable)


class EngineHost:
    """Owns what a run's engine needs outside the model: the server process, if the run starts one, and the push folder.

    The server is launched before the models are built, so that both load at the same time. It starts with random
    weights; the first push brings the student's.
    """

    def __init__(self, config: GkdConfig, world: World, shapes: HfShapes):
        self._config, self._world, self._vocab_size = config, world, shapes.vocab_size
        self._server: ServerProcess | None = None
        self._engine: RolloutEngine | None = None
        self._push_folder: Path | None = None
        self.pusher: WeightPusher | None = None
        self.probe: list[list[int]] = []

    def launch(self) -> None:
        """Start loading a colocated server; returns at once."""
        rollout = self._config.rollout
        if not isinstance(rollout, SglangRolloutConfig) or rollout.placement != "colocated":
            return
        if self._world.is_leader:
            log_file = log_folder(self._config) / "sglang.log"
            self._server = ServerProcess.launch(self._settings(rollout, log_file.stem), log_file=log_file)

    def connect(self, student: Student, tokenizer: Tokenizer) -> RolloutEngine:
        """The engine over the student; waits for a colocated server. Collective.

        Raises:
            EngineError: The server did not start or does not answer; on all ranks.
        """
        rollout = self._config.rollout
        sampling = Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, tokenizer.eos_ids
        )
        if not isinstance(rollout, SglangRolloutConfig):
            self._engine = MegatronRollout(
                student.model,
                student.groups,
                student.tap,
                sampling,
                vocab_size=self._vocab_size,
                stop=rollout.stop,
                decode=tokenizer.decode,
            )
            return self._engine
        clients = self._connect_clients(rollout)
        self.pusher = self._make_pusher(rollout, student, clients)
        self._engine = SglangRollout(
            clients,
            sampling,
            stop=rollout.stop,
            decode=tokenizer.decode,
            is_leader=self._world.is_leader,
            broadcast=self._broadcast,
            push=self.pusher.push,
        )
        return self._engine

    def close(self) -> None:
        """Stop what was started; harmless when called twice."""
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.stop()
            self._server = None
        if self._push_folder is not None and self._world.is_leader:
            shutil.rmtree(self._push_folder, ignore_errors=True)

    def _broadcast(self, value):
        return broadcast_json(value, device=self._world.device)

    def _settings(self, rollout: SglangRolloutConfig, process: str) -> ServerSettings:
        config = self._config
        model_folder = config.student.hf_folder
        environment = Environment.of(config.runtime.env_vars, Place(config.train.output_dir, process))
        environment.make_folders()
        return ServerSettings(
            model_folder,
            context_length=config.seq_length,
            max_running_requests=min(config.train.global_batch_size, 256),
            dtype="float32" if config.train.precision == "fp32" else "bfloat16",
            on_cpu=self._world.platform.is_cpu,
            tp_size=rollout.tensor_model_parallel_size,
            mem_fraction_static=rollout.mem_fraction_static,
            num_threads=rollout.num_threads,
            has_random_weights=True,
            environment=environment.values,
        )

    def _connect_clients(self, rollout: SglangRolloutConfig) -> list[SglangClient]:
        """Clients on the leader, none elsewhere; every rank raises if the leader cannot reach a server."""
        clients: list[SglangClient] = []
        error = None
        if self._world.is_leader:
            try:
                clients = self._clients_of_leader(rollout)
            except (EngineError, ValueError) as problem:
                error = str(problem)
        error = self._broadcast(error)
        if error:
            raise EngineError(error)
        return clients

    def _clients_of_leader(self, rollout: SglangRolloutConfig) -> list[SglangClient]:
        options = {
            "vocab_size": self._vocab_size,
            "request_timeout_s": rollout.request_timeout_s,
            "max_retries": rollout.max_retries,
        }
        if self._server is not None:
            self._server.wait_until_healthy(rollout.start_timeout_s)
            return [self._server.client(**options)]
        api_key = api_key_of(rollout)
        clients = [SglangClient(url, api_key=api_key, **options) for url in rollout.urls]
        for client in clients:
            client.check_settings(num_sequence_tokens=self._config.seq_length)
        return clients

    def _make_pusher(
        self, rollout: SglangRolloutConfig, student: Student, clients: list[SglangClient]
    ) -> WeightPusher:
        config = self._config
        base = push_base(config, rollout)
        name = self._broadcast(f"megatron_gkd-{secrets.token_hex(6)}" if self._world.is_leader else None)
        folder = self._push_folder = base / name
        if self._world.is_leader:
            folder.mkdir(parents=True, mode=0o700)
        file = SharedWeightFile(
            folder,
            student.weights,
            merged_parameters(student.model),
            student.groups,
            student.dtype,
            self._world.device,
        )
        tolerance = rollout.probe_tolerance or PROBE_TOLERANCE[config.train.precision]
        return WeightPusher(
            file,
            clients,
            lambda: (self.probe, trainer_log_probs(student, self.probe)),
            tolerance,
            self._world.device,
        )
