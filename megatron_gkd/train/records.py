"""What a run writes about itself: metrics, samples, status and the progress line."""

import logging

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Batch
from megatron_gkd.data.tokenizer import Tokenizer
from megatron_gkd.observability.metrics import Metrics, MetricsWriter, SampleWriter
from megatron_gkd.observability.run_folder import State, StatusFile
from megatron_gkd.observability.timing import Progress, Timers
from megatron_gkd.parallel.collectives import reduce_values
from megatron_gkd.parallel.groups import Job
from megatron_gkd.rollout.base import PushReport
from megatron_gkd.train.loss import DETAILS, lost_mass_warning
from megatron_gkd.train.state import TrainState
from megatron_gkd.train.step import StepResult

log = logging.getLogger(__name__)

GIB = 2**30


class Records:
    """The records of one run; files are written by the leader only.

    ``latest`` holds the metrics of the last iteration, on all ranks.

    Args:
        config: The run's configuration.
        job: This process.
        tokenizer: Turns samples back into text.
    """

    def __init__(self, config: GkdConfig, job: Job, tokenizer: Tokenizer):
        self._job, self._tokenizer = job, tokenizer
        self._num_samples, self._loss = config.logging.num_samples, config.loss
        self._has_warned_of_lost_mass = False
        self._total = config.train.train_iters
        self.metrics, self.timers = Metrics(), Timers(job.platform.synchronize)
        self.latest: dict[str, float] = {}
        self._progress = Progress(self._total)
        self._writer: MetricsWriter | None = None
        self._samples: SampleWriter | None = None
        self._status: StatusFile | None = None
        if job.is_leader:
            folder = config.train.output_dir
            self._writer = MetricsWriter(folder, config.logging.tensorboard)
            self._samples, self._status = SampleWriter(folder), StatusFile(folder)
            (folder / "config.yaml").write_text(config.to_yaml())

    def start(self, iteration: int) -> None:
        """Drop what an earlier attempt wrote about later iterations, and start the clock."""
        for writer in (self._writer, self._samples):
            if writer is not None:
                writer.truncate_after(iteration)
        self._progress = Progress(self._total)
        self.status("running", iteration)

    def status(self, state: State, iteration: int, reason: str = "") -> None:
        """Replace ``status.json``."""
        if self._status is not None:
            self._status.write(state, iteration, reason)

    def finish_iteration(
        self, state: TrainState, batch: Batch, result: StepResult, lr: float, push: PushReport | None
    ) -> None:
        """Reduce the metrics over ranks, write them, and log the progress line. Collective."""
        _add_batch(self.metrics, batch, state)
        _add_step(self.metrics, batch, result, state, lr)
        self._warn_of_lost_mass(result)
        if push is not None:
            self.metrics.add("push/bytes", push.num_bytes, unit="bytes", reduce="rank0")
            self.metrics.add("push/probe_difference", push.max_difference, unit="nats", reduce="rank0")
        peak = self._job.platform.peak_memory_bytes() / GIB
        self.metrics.add("memory/peak_gib", peak, unit="GiB", reduce="max")
        self.timers.record(self.metrics)
        metrics = self.metrics.take()
        values = reduce_values(
            [m.value for m in metrics], [m.reduce for m in metrics], device=self._job.device
        )
        by_name = {metric.name: value for metric, value in zip(metrics, values, strict=True)}
        self.latest = by_name
        line = self._progress.finish(
            state.iteration, loss=by_name["loss"], lag=int(by_name["lag"]), num_tokens=int(by_name["tokens"])
        )
        log.info("%s", line)
        if "validation/loss" in by_name:
            log.info("Validation loss %.4f nats/token", by_name["validation/loss"])
        if self._writer is not None and self._samples is not None:
            self._writer.declare(metrics)
            self._writer.write(state.iteration, by_name)
            self._write_samples(state.iteration, batch)
            self.status("running", state.iteration)

    def close(self) -> None:
        """Close the files."""
        for writer in (self._writer, self._samples):
            if writer is not None:
                writer.close()

    def _warn_of_lost_mass(self, result: StepResult) -> None:
        """Once in a run; the metric goes on."""
        message = lost_mass_warning(result.details, self._loss)
        if message and self._job.is_leader and not self._has_warned_of_lost_mass:
            log.warning("%s", message)
            self._has_warned_of_lost_mass = True

    def _write_samples(self, iteration: int, batch: Batch) -> None:
        assert self._samples is not None
        for sample in batch.samples[: self._num_samples]:
            self._samples.write(
                iteration,
                file=sample.file,
                row=sample.row,
                prompt=self._tokenizer.decode(sample.prompt_ids),
                completion=self._tokenizer.decode(sample.completion_ids),
                finish_reason=sample.finish_reason,
                is_on_policy=sample.is_on_policy,
                weight_version=sample.weight_version,
            )


def _add_batch(metrics: Metrics, batch: Batch, state: TrainState) -> None:
    written = [sample for sample in batch.samples if sample.is_on_policy]
    num_written = sum(len(sample.completion_ids) for sample in written)
    # the completions of iteration i (from 1) were written by weights of version i - 1 when nothing lags
    lag = max((state.iteration - 1 - sample.weight_version for sample in written), default=0)
    metrics.add("lag", lag, unit="iterations", reduce="rank0")
    metrics.add("tokens", batch.num_loss_tokens, unit="tokens", reduce="rank0")
    metrics.add("tokens/consumed", state.consumed_tokens, unit="tokens", reduce="rank0")
    metrics.add("rollout/tokens", num_written, unit="tokens", reduce="rank0")
    metrics.add("rollout/on_policy_share", len(written) / len(batch.samples), unit="1", reduce="rank0")
    if written:
        stopped = sum(sample.finish_reason == "stop" for sample in written)
        metrics.add("rollout/completion_length", num_written / len(written), unit="tokens", reduce="rank0")
        metrics.add("rollout/stopped_share", stopped / len(written), unit="1", reduce="rank0")


def _add_step(metrics: Metrics, batch: Batch, result: StepResult, state: TrainState, lr: float) -> None:
    num_on_policy = sum(s.num_loss_tokens for s in batch.samples if s.is_on_policy)
    num_off_policy = batch.num_loss_tokens - num_on_policy
    total = result.on_policy_loss_sum + result.off_policy_loss_sum
    metrics.add("loss", total / max(batch.num_loss_tokens, 1), unit="nats/token", reduce="sum")
    if num_on_policy:
        value = result.on_policy_loss_sum / num_on_policy
        metrics.add("loss/on_policy", value, unit="nats/token", reduce="sum")
    if num_off_policy:
        value = result.off_policy_loss_sum / num_off_policy
        metrics.add("loss/off_policy", value, unit="nats/token", reduce="sum")
    for name, value in result.details.items():
        metrics.add(f"loss/{name}", value, unit=DETAILS[name], reduce="rank0")
    metrics.add("grad_norm", result.grad_norm, unit="1", reduce="rank0")
    metrics.add("lr", lr, unit="1", reduce="rank0")
    metrics.add("train/skipped_updates", state.skipped_updates, unit="iterations", reduce="rank0")
