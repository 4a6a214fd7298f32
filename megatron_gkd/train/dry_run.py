"""Two iterations on synthetic batches of the largest shapes: memory and time of an update."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from megatron_gkd.config import GkdConfig
from megatron_gkd.data.sample import Batch, Sample
from megatron_gkd.observability.timing import Timers
from megatron_gkd.parallel.collectives import reduce_values
from megatron_gkd.parallel.groups import Job
from megatron_gkd.platform.device import Platform
from megatron_gkd.platform.kernels import detect_kernels
from megatron_gkd.train import setup
from megatron_gkd.train.backend import require_loss_backend, with_backend_of
from megatron_gkd.train.step import attach_signals, train_step

log = logging.getLogger(__name__)

GIB = 2**30
NUM_ITERATIONS = 2
STAGES = ("teacher", "student")


def dry_run(config: GkdConfig, platform: Platform) -> str:
    """Build student and teacher, update the student twice, write nothing. Collective.

    Every sample has ``data.max_prompt_length`` + ``rollout.max_new_tokens`` tokens, and for the teacher its longest prompt: no
    iteration of the run has more tokens. Completions count in the loss. In conversations from data, earlier turns of the
    assistant count too; the loss then takes more time, not more memory.

    Args:
        config: Checked configuration.
        platform: The device of this process.

    Returns:
        Table of stage times and of peak memory per rank, the same on all ranks.

    Raises:
        DataError: Student and teacher have different vocabularies.
        ConfigError: The teacher's server does not answer or serves another model.
        CheckpointError: A model's checkpoint is damaged.
    """
    tokenizer = setup.build_tokenizer(config)
    config = setup.with_iterations(config, tokenizer)
    job = Job.of_process(platform, detect_kernels(on_cpu=platform.is_cpu))
    require_loss_backend(config, platform.device)
    setup.check_teacher(config, job, tokenizer)
    with ExitStack() as cleanup:
        setup.join(job, cleanup)
        student = setup.build_student(config, job)
        config = with_backend_of(config, student, job.device)
        teacher = setup.build_teacher(config, job, tokenizer, student)
        loss = setup.build_loss(config, student, teacher)
        sharding = setup.build_sharding(config, student.groups, tokenizer.pad_id)
        seconds = []
        for iteration in range(NUM_ITERATIONS):
            batch = largest_batch(config, student.shapes.vocab_size, seed=iteration)
            micro_batches = sharding.micro_batches(batch)
            timers = Timers(platform.synchronize)
            with timers("teacher"):
                signals = teacher.score(batch, micro_batches)
            with timers("student"):
                student.schedule.set_iteration(iteration)
                scored = attach_signals(batch, micro_batches, signals)
                train_step(student, loss, scored)
            slowest = reduce_values(
                [timers.seconds[stage] for stage in STAGES], ["max"] * len(STAGES), device=job.device
            )
            seconds.append(slowest)
            log.info("Dry iteration %d of %d took %.1f s", iteration + 1, NUM_ITERATIONS, sum(slowest))
        own_peak = [platform.peak_memory_bytes() * (rank == job.rank) for rank in range(job.size)]
        peaks = reduce_values(own_peak, ["sum"] * job.size, device=job.device)
    return _report(config, seconds, peaks)


def largest_batch(config: GkdConfig, vocab_size: int, seed: int) -> Batch:
    """Random ids in the most and longest samples that an iteration can have."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train.global_batch_size, config.seq_length)
    rows = torch.randint(vocab_size, shape, generator=generator).tolist()
    cut = config.data.max_prompt_length
    teacher_ids = (0,) * config.data.teacher_prompt_length if config.data.teacher_prompt_length > cut else ()
    return Batch(
        tuple(
            Sample(
                row, 0, tuple(ids[:cut]), tuple(ids[cut:]), True, "length", 0, teacher_prompt_ids=teacher_ids
            )
            for row, ids in enumerate(rows)
        )
    )


def _report(config: GkdConfig, seconds: Sequence[Sequence[float]], peaks: Sequence[float]) -> str:
    tokens = config.train.global_batch_size * config.seq_length
    lines = [
        f"{config.train.global_batch_size} samples of {config.seq_length} tokens = {tokens} tokens per iteration",
        f"{'stage':<10}{'first':>10}{'second':>10}",
        *(
            f"{stage:<10}" + "".join(f"{times[i]:>8.2f} s" for times in seconds)
            for i, stage in enumerate(STAGES)
        ),
        *(f"rank {rank}: peak memory {peak / GIB:.2f} GiB" for rank, peak in enumerate(peaks)),
        f"generation (rollout.kind={config.rollout.kind}) and its memory are not part of a dry run; nothing was written",
    ]
    return "\n".join(lines)
