"""Life of one training process: data before any process group, then the parts, the loop, and an orderly end."""

import logging

import torch.distributed as dist

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Prompt
from megatron_gkd.data.streams import PromptStream
from megatron_gkd.observability.run_folder import State
from megatron_gkd.parallel.groups import Job
from megatron_gkd.platform.device import Platform
from megatron_gkd.platform.kernels import detect_kernels
from megatron_gkd.rollout import ROLLOUTS
from megatron_gkd.rollout.base import RolloutContext, RolloutEngine
from megatron_gkd.train.inputs import build_prompts, build_tokenizer, build_validation_prompts
from megatron_gkd.train.loop import Trainer, build_trainer
from megatron_gkd.train.preconditions import require_loss_backend, require_teacher
from megatron_gkd.train.stop import StopRequest

log = logging.getLogger(__name__)


class Run:
    """One run of the training command in this process.

    Args:
        config: Checked configuration.
        platform: The device of this process.
    """

    def __init__(self, config: GkdConfig, platform: Platform):
        self._config, self._platform = config, platform
        self._stop = StopRequest(config.train.output_dir)
        self._rollout: RolloutEngine | None = None
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
        job = Job.of_process(self._platform, detect_kernels(on_cpu=self._platform.is_cpu))
        context = RolloutContext(self._config, job, tokenizer)
        ROLLOUTS[type(self._config.rollout)].preflight(self._config.rollout, context)
        require_teacher(self._config, tokenizer)
        self._build(context, loader, validation)

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
        if self._rollout is not None:
            self._rollout.close()
        if self._trainer is not None:
            self._trainer.records.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _with_iterations(self, loader: PromptStream) -> GkdConfig:
        config = self._config.with_iterations(loader.prompts_per_epoch)
        if config is not self._config:
            log.info(
                "train.epochs=%g of %d prompts are %d iterations",
                self._config.train.epochs,
                loader.prompts_per_epoch,
                config.train.train_iters,
            )
        return config

    def _build(self, context: RolloutContext, loader: PromptStream, validation: tuple[Prompt, ...]) -> None:
        config, job = context.config, context.job
        job.join()
        log.info("%d ranks on %s (%s); %s", job.size, job.device, self._platform.reason, job.kernels.reason)
        # first: a server that the run starts loads while the models are built
        self._rollout = ROLLOUTS[type(config.rollout)].build(config.rollout, context)
        self._trainer = build_trainer(config, job, context.tokenizer, loader, validation, self._rollout)
        self._trainer.resume()
