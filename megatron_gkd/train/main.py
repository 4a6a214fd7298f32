"""Life of one training process: data before any process group, then the parts, the loop, and an orderly end."""

import logging

import torch.distributed as dist

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.streams import PromptStream
from megatron_gkd.data.tokenizer import Tokenizer
from megatron_gkd.observability.status import State
from megatron_gkd.parallel.groups import join_job
from megatron_gkd.platform.device import Platform
from megatron_gkd.platform.kernels import detect_kernels
from megatron_gkd.train.build import start_world
from megatron_gkd.train.engines import EngineHost
from megatron_gkd.train.inputs import build_prompts, build_tokenizer, build_validation_prompts
from megatron_gkd.train.loop import Trainer, build_trainer
from megatron_gkd.train.preconditions import require_engine, require_loss_backend, require_teacher
from megatron_gkd.train.stop import StopRequest

log = logging.getLogger(__name__)


class Run:
    """One run of the training command in this process.

    Args:
        config: Checked configuration.
        platform: The device of this process.
        rank: Of this process in the job.
    """

    def __init__(self, config: GkdConfig, platform: Platform, rank: int):
        self._config, self._platform, self._rank = config, platform, rank
        self._stop = StopRequest(config.train.output_dir)
        self._host: EngineHost | None = None
        self._trainer: Trainer | None = None

    @property
    def iteration(self) -> int:
        """Finished iterations."""
        return self._trainer.state.iteration if self._trainer else 0

    def prepare(self) -> None:
        """Read the data, join the job, build the parts, resume.

        Raises:
            ConfigError, DataError, CheckpointError: The input cannot be used; nothing was trained or changed.
            CertificateError: The loss is wrong on this machine.
        """
        self._stop.listen()
        tokenizer = build_tokenizer(self._config)
        loader = build_prompts(self._config, tokenizer)
        validation = build_validation_prompts(self._config, tokenizer)
        self._config = self._with_iterations(loader)
        require_loss_backend(self._config, self._platform.device)
        require_engine(self._config, self._platform.device, is_leader=self._rank == 0)
        require_teacher(self._config, tokenizer)
        self._build(tokenizer, loader, validation)

    def train(self) -> State:
        """Train to the end or to a stop request; returns the final state and writes it to ``status.json``."""
        assert self._trainer is not None
        trainer = self._trainer
        outcome = trainer.run(self._stop)
        reason = self._stop.reason or "all iterations are done"
        trainer.records.status(outcome, trainer.state.iteration, reason)
        dist.barrier()
        return outcome

    def close(self) -> None:
        """Stop the server, close the files and leave the job; harmless when called twice."""
        if self._host is not None:
            self._host.close()
        if self._trainer is not None:
            self._trainer.records.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _with_iterations(self, loader: PromptStream) -> GkdConfig:
        config = self._config.with_iterations(loader.prompts_per_pass)
        if config is not self._config:
            log.info(
                "train.epochs=%g of %d prompts are %d iterations",
                self._config.train.epochs,
                loader.prompts_per_pass,
                config.train.train_iters,
            )
        return config

    def _build(self, tokenizer: Tokenizer, loader: PromptStream, validation: tuple[Prompt, ...]) -> None:
        kernels = detect_kernels(on_cpu=self._platform.is_cpu)
        join_job(self._platform.collective_backend)
        world = start_world(self._platform, kernels)
        log.info("%d ranks on %s (%s); %s", world.size, world.device, self._platform.reason, kernels.reason)
        self._trainer = build_trainer(self._config, world, tokenizer, loader, validation, self._keep_host)
        self._trainer.resume()

    def _keep_host(self, host: EngineHost) -> None:
        self._host = host
