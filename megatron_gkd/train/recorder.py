"""What a run writes about itself: metrics, samples, status and the progress line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Batch
from megatron_gkd.data.tokenizer import Tokenizer
from megatron_gkd.losses.token_loss import METRIC_UNITS
from megatron_gkd.observability.metrics import Metrics, MetricsWriter, SampleWriter
from megatron_gkd.observability.run_folder import State, StatusFile
from megatron_gkd.observability.timing import Progress, Timers
from megatron_gkd.parallel.collectives import reduce_values
from megatron_gkd.parallel.groups import Job
from megatron_gkd.rollout.base import PushReport
from megatron_gkd.serving.errors import EngineError
from megatron_gkd.train.lifecycle import TrainState
from megatron_gkd.train.loss import lost_mass_warning
from megatron_gkd.train.step import StepResult

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass
class IterationRecord:
    """Metrics of one iteration.

    Attributes:
        metrics: Collects them.
        timer: Times a stage: ``with record.timer("teacher"): ...``.
        batch: The samples, once their update is done; ``None`` before.
    """

    metrics: Metrics
    timer: Timers
    batch: Batch | None = None

    def add_update(self, state: TrainState, batch: Batch, result: StepResult, lr: float) -> None:
        """Add the metrics of a batch and of its update.

        Args:
            state: Counters after the update.
            batch: All samples of the iteration.
            result: Of the update.
            lr: Learning rate.
        """
        self.batch = batch
        self._add_batch(batch, state)
        metrics = self.metrics
        num_on_policy = sum(s.num_loss_tokens for s in batch.samples if s.is_on_policy)
        num_off_policy = batch.num_loss_tokens - num_on_policy
        total = result.on_policy_loss_sum + result.off_policy_loss_sum
        # each rank divides its own sum by the global number of tokens, so the sum over ranks is the mean
        metrics.add("loss", total / max(batch.num_loss_tokens, 1), unit="nats/token", reduce="sum")
        if num_on_policy:
            value = result.on_policy_loss_sum / num_on_policy
            metrics.add("loss/on_policy", value, unit="nats/token", reduce="sum")
        if num_off_policy:
            value = result.off_policy_loss_sum / num_off_policy
            metrics.add("loss/off_policy", value, unit="nats/token", reduce="sum")
        for name, value in result.metrics.items():
            metrics.add(f"loss/{name}", value, unit=METRIC_UNITS[name], reduce="rank0")
        metrics.add("grad_norm", result.grad_norm, unit="1", reduce="rank0")
        metrics.add("lr", lr, unit="1", reduce="rank0")
        metrics.add("train/skipped_updates", state.skipped_updates, unit="iterations", reduce="rank0")

    def add_push(self, push: PushReport | None) -> None:
        """Add size and probe of a weight push."""
        if push is not None:
            self.metrics.add("push/bytes", push.num_bytes, unit="bytes", reduce="rank0")
            self.metrics.add("push/probe_difference", push.max_difference, unit="nats", reduce="rank0")

    def _add_batch(self, batch: Batch, state: TrainState) -> None:
        metrics = self.metrics
        sampled = [sample for sample in batch.samples if sample.is_on_policy]
        num_tokens = sum(len(sample.completion_ids) for sample in sampled)
        # strictly on-policy, iteration i (from 1) trains on completions of weight version i - 1
        lag = max((state.iteration - 1 - sample.weight_version for sample in sampled), default=0)
        metrics.add("lag", lag, unit="iterations", reduce="rank0")
        metrics.add("tokens", batch.num_loss_tokens, unit="tokens", reduce="rank0")
        metrics.add("tokens/consumed", state.consumed_tokens, unit="tokens", reduce="rank0")
        metrics.add("rollout/tokens", num_tokens, unit="tokens", reduce="rank0")
        metrics.add("rollout/on_policy_share", len(sampled) / len(batch.samples), unit="1", reduce="rank0")
        if sampled:
            stopped = sum(sample.finish_reason == "stop" for sample in sampled)
            metrics.add("rollout/completion_length", num_tokens / len(sampled), unit="tokens", reduce="rank0")
            metrics.add("rollout/stopped_share", stopped / len(sampled), unit="1", reduce="rank0")


class Recorder:
    """The records of one run; only the leader writes files.

    Args:
        config: Of the run.
        job: This process.
        tokenizer: Decodes the samples.

    Attributes:
        latest: Metrics of the last iteration, equal on all ranks.
    """

    def __init__(self, config: GkdConfig, job: Job, tokenizer: Tokenizer):
        self._job, self._tokenizer = job, tokenizer
        self._num_samples, self._loss = config.logging.num_samples, config.loss
        self._has_warned_of_lost_mass = False
        self._total = config.train.train_iters
        self._metrics, self._timers = Metrics(), Timers(job.platform.synchronize)
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
        """Drop the records of later iterations, left by an earlier attempt, and start the clock."""
        for writer in (self._writer, self._samples):
            if writer is not None:
                writer.truncate_after(iteration)
        self._progress = Progress(self._total)  # the time before, spent on loading, is no iteration's
        self.status("running", iteration)

    def status(self, state: State, iteration: int, reason: str = "") -> None:
        """Replace ``status.json``."""
        if self._status is not None:
            self._status.write(state, iteration, reason)

    @contextmanager
    def iteration(self, state: TrainState) -> Iterator[IterationRecord]:
        """Time an iteration, and write its record at the end. Collective.

        The record is also written if the weight push fails, because the update is done by then. An iteration that fails
        before its update leaves no record.
        """
        record = IterationRecord(self._metrics, self._timers)
        try:
            with self._timers("iteration"):
                yield record
        except EngineError:  # on every rank alike, so that the reduction below is safe
            if record.batch is not None:
                self._write(state.iteration, record.batch)
            raise
        assert record.batch is not None  # the loop adds the update
        self._write(state.iteration, record.batch)

    def _write(self, iteration: int, batch: Batch) -> None:
        """Reduce the metrics over ranks, write them, and log the progress line."""
        peak = self._job.platform.peak_memory_bytes() / GIB
        self._metrics.add("memory/peak_gib", peak, unit="GiB", reduce="max")
        self._timers.record(self._metrics)
        metrics = self._metrics.take()
        values = reduce_values(
            [m.value for m in metrics], [m.reduce for m in metrics], device=self._job.device
        )
        by_name = {metric.name: value for metric, value in zip(metrics, values, strict=True)}
        self.latest = by_name
        self._warn_of_lost_mass(by_name)
        line = self._progress.finish(
            iteration, loss=by_name["loss"], lag=int(by_name["lag"]), num_tokens=int(by_name["tokens"])
        )
        log.info("%s", line)
        if "validation/loss" in by_name:
            log.info("Validation loss %.4f nats/token", by_name["validation/loss"])
        if self._writer is not None and self._samples is not None:
            self._writer.declare(
                metrics
            )  # a metric may first appear in a later iteration, as the validation does
            self._writer.write(iteration, by_name)
            self._write_samples(self._samples, iteration, batch)
            self.status("running", iteration)

    def close(self) -> None:
        """Close the files."""
        for writer in (self._writer, self._samples):
            if writer is not None:
                writer.close()

    def _warn_of_lost_mass(self, metrics: dict[str, float]) -> None:
        means = {name: metrics[f"loss/{name}"] for name in METRIC_UNITS if f"loss/{name}" in metrics}
        message = lost_mass_warning(means, self._loss)
        if message and self._job.is_leader and not self._has_warned_of_lost_mass:
            log.warning("%s", message)
            self._has_warned_of_lost_mass = True  # the metric continues

    def _write_samples(self, writer: SampleWriter, iteration: int, batch: Batch) -> None:
        for sample in batch.samples[: self._num_samples]:
            writer.write(
                iteration,
                file=sample.file,
                row=sample.row,
                prompt=self._tokenizer.decode(sample.prompt_ids),
                completion=self._tokenizer.decode(sample.completion_ids),
                finish_reason=sample.finish_reason,
                is_on_policy=sample.is_on_policy,
                weight_version=sample.weight_version,
            )
