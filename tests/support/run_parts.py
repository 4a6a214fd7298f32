"""The parts of a run in the ranks of the pool: models, batches, steps, checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from megatron_gkd.data.sample import Batch, Sample
from tests.support.on_ranks import allow_saving, destroy_all_groups, no_kernels
from tests.support.tiny_models import EOS_ID, PAD_ID

LENGTHS = ((4, 5), (2, 9), (6, 0), (3, 0), (5, 1), (9, 12), (1, 3), (7, 4))
"""(prompt, completion) tokens of a batch of eight: ragged, with a micro-batch of two that has no rows."""

FOUR_LENGTHS = ((4, 5), (2, 9), (6, 0), (7, 4))
"""Of a batch of four; sample 2 is a micro-batch of one without rows of the loss."""

PROBE = [[5, 6, 7, 8, 9], [100, 101]]
"""Sequences that engine and student score after a push."""


def make_batches(num: int) -> list[Batch]:
    """Batches of eight, with the seeds 0 to ``num`` - 1."""
    return [make_batch(seed) for seed in range(num)]


def make_batch(seed: int, lengths: tuple[tuple[int, int], ...] = LENGTHS) -> Batch:
    """Random samples of (prompt, completion) lengths; every other one on-policy."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for row, (prompt, completion) in enumerate(lengths):
        ids = torch.randint(250, (prompt + completion,), generator=generator).tolist()
        ids[prompt + completion - 1] = EOS_ID
        samples.append(
            Sample(
                row=row,
                sample_index=0,
                prompt_ids=tuple(ids[:prompt]),
                completion_ids=tuple(ids[prompt:]),
                is_on_policy=row % 2 == 0,
                finish_reason="stop",
                weight_version=0,
            )
        )
    return Batch(tuple(samples))


def make_world(rank: int, world_size: int) -> Any:
    import torch

    from megatron_gkd.parallel.groups import Job
    from megatron_gkd.platform.device import Platform

    return Job(Platform(torch.device("cpu"), "gloo", "test"), no_kernels(), rank, world_size)


class Parts(NamedTuple):
    """What a step needs: the student, the teacher, and the shard of the teacher's head."""

    student: Any
    teacher: Any
    head_VH: Any


def build_parts(config: Any, world: Any) -> Parts:
    """The parts of a run without engines. Collective."""
    from megatron_gkd.train.setup import build_student, build_teacher

    student = build_student(config, world)
    tokenizer: Any = SimpleNamespace(pad_id=PAD_ID)
    teacher = build_teacher(config, world, tokenizer, student)
    return Parts(student, teacher, teacher.head_VH)


def export_gradients(student: Any, file: Path) -> None:
    """Write the gradient of the last step under the weights' Hugging Face names. Collective."""
    import torch
    import torch.distributed as dist

    from megatron_gkd.reshard.layout import hf_tensors, owned_slices
    from megatron_gkd.reshard.transport import MappedSafetensors

    _gather_gradients(student)
    gradients = {name: parameter.main_grad for name, parameter in student.model.named_parameters()}
    target, groups = MappedSafetensors(hf_tensors(student.shapes), torch.float32), student.groups
    if dist.get_rank() == 0:
        target.create(file)
    dist.barrier()
    if groups.dp_rank == 0:
        own = owned_slices(
            student.weights, tp_rank=groups.tp_rank, pp_rank=groups.pp_rank, parameters=gradients
        )
        target.write(file, gradients, own)
    dist.barrier()


def _gather_gradients(student: Any) -> None:
    """With the distributed optimizer a rank has the sum over the copies for its own part of a bucket only."""
    import torch.distributed as dist

    groups = student.groups
    for bucket in [bucket for chunk in student.ddp for buffer in chunk.buffers for bucket in buffer.buckets]:
        if student.ddp[0].ddp_config.use_distributed_optimizer:
            own = bucket.grad_data.chunk(groups.layout.dp_size)[groups.dp_rank].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=groups.pg.dp_cp)


def leave() -> None:
    """Undo ``build_parts``, so that the next layout finds a clean process."""
    destroy_all_groups()


def copy_of(model: Any) -> dict[str, Any]:
    """The weights by name, as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def update(
    parts: Parts, batch: Batch, iteration: int, config: Any, *, pad_to_multiple_of: int = 2
) -> tuple[Any, float]:
    """One iteration without rollout: (result of the step, mean loss over the completion tokens of all ranks)."""
    import torch

    from megatron_gkd.parallel.collectives import reduce_values
    from megatron_gkd.train.loss import RunLoss
    from megatron_gkd.train.step import attach_signals, train_step

    student, teacher, head_VH = parts
    micro_batches = batch.micro_batches(
        config.train.micro_batch_size,
        dp_rank=student.groups.dp_rank,
        dp_size=student.groups.layout.dp_size,
        seq_length=batch.padded_length(pad_to_multiple_of),
        pad_id=PAD_ID,
    )
    student.schedule.set_iteration(iteration)
    signals = teacher.score(batch, micro_batches)
    loss = RunLoss(config.loss, student.groups.pg.tp, student.shapes.vocab_size, head_VH)
    result = train_step(student, loss, attach_signals(batch, micro_batches, signals))
    own = result.on_policy_loss_sum + result.off_policy_loss_sum
    total = reduce_values([own], ["sum"], device=torch.device("cpu"))[0]
    return result, total / batch.num_loss_tokens


def make_store(config: Any, student: Any) -> Any:
    """The checkpoints of a run."""
    import torch

    from megatron_gkd.checkpoint.store import CheckpointStore

    return CheckpointStore(
        config.train.output_dir / "checkpoints",
        hf_files=config.student.hf_folder,
        groups=student.groups,
        dtype=student.dtype,
        device=torch.device("cpu"),
    )


def check_resume(rank: int, world_size: int, config_file: Path) -> None:
    """Two updates, a checkpoint, two more: after loading the checkpoint, the last two repeat bit for bit."""
    import torch

    from megatron_gkd.config import load_config

    allow_saving()
    config, world, batches = load_config(config_file), make_world(rank, world_size), make_batches(4)
    half = len(batches) // 2
    parts = build_parts(config, world)
    for i in range(half):
        update(parts, batches[i], i, config)
    make_store(config, parts.student).save(half, parts.student.model, parts.student.optimizer, {})
    unbroken = [update(parts, batches[i], i, config) for i in range(half, len(batches))]
    expected = copy_of(parts.student.model)
    leave()

    parts = build_parts(config, world)
    store = make_store(config, parts.student)
    store.load(store.find_newest_valid(), parts.student.model, parts.student.optimizer)
    resumed = [update(parts, batches[i], i, config) for i in range(half, len(batches))]
    assert resumed == unbroken
    for name, parameter in parts.student.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    leave()
