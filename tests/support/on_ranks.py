"""Layouts, models and saving inside the ranks of the pool. Imports Megatron: only ranks use the functions.

The pool lives long, so what a layout leaves behind (process groups with their threads) is removed here.
"""

import contextlib
import gc
import multiprocessing
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


class Split(NamedTuple):
    """How a model is spread; the rest of the ranks is data parallelism."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    vpp: int = 1

    def __str__(self) -> str:
        sizes = (("TP", self.tp), ("PP", self.pp), ("VPP", self.vpp))
        parts = [f"{name}{size}" for name, size in sizes if size > 1]
        return ("x".join(parts) or "DP") + "+SP" * self.sequence_parallel


TP2, PP2, DP, TP2_SP = Split(tp=2), Split(pp=2), Split(), Split(tp=2, sequence_parallel=True)
PP2_VPP2 = Split(pp=2, vpp=2)
TP2_PP2, TP2_PP2_SP, PP4 = Split(2, 2), Split(2, 2, sequence_parallel=True), Split(pp=4)


@contextlib.contextmanager
def student_groups(split: Split, seed: int = 0) -> Iterator[Any]:
    """``ModelGroups`` through Megatron's global state; all groups made inside the block are destroyed after it."""
    from megatron_gkd.parallel.groups import init_student_groups

    yield init_student_groups(split.tp, split.pp, seed, split.vpp)
    # not after a failure: the pool restarts then, and other ranks may be in another place
    destroy_all_groups()


def destroy_all_groups() -> None:
    """Reset Megatron's ``parallel_state`` and destroy every process group but the world; collective."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models lie in cycles and hold their groups


def no_kernels() -> Any:
    """What ``detect_kernels`` finds on a CPU."""
    from megatron_gkd.platform.kernels import Kernels

    return Kernels(transformer_engine=False, apex_gradient_fusion=False, reason="test")


def load_model(
    source: Path, groups: Any, split: Split, *, is_checkpoint: bool = False, **options: Any
) -> Any:
    """This rank's part of the model in a Hugging Face folder or a checkpoint, fp32 unless ``dtype`` is given."""
    from megatron_gkd.checkpoint.weights import WeightSource, load_weights
    from megatron_gkd.config.hf_shapes import load_hf_shapes
    from megatron_gkd.models.gpt import build_gpt

    weights = WeightSource(source, is_checkpoint)
    shapes = load_hf_shapes(weights.hf_folder)
    dtype = options.pop("dtype", torch.float32)
    model = build_gpt(
        shapes,
        groups,
        dtype=dtype,
        device=torch.device("cpu"),
        kernels=no_kernels(),
        max_seq_length=128,
        sequence_parallel=split.sequence_parallel,
        **options,
    )
    load_weights(model, weights, shapes, groups, device=torch.device("cpu"), **options)
    return model


def gather_vocabulary(shard_TV: torch.Tensor, groups: Any, vocab_size: int) -> torch.Tensor:
    """[T, vocab_size] columns of all tensor-parallel ranks, without the padding."""
    shards = [torch.empty_like(shard_TV) for _ in range(groups.layout.tp_size)]
    dist.all_gather(shards, shard_TV.contiguous(), group=groups.pg.tp)
    return torch.cat(shards, dim=1)[:, :vocab_size]


def allow_saving(*, in_background: bool = False) -> None:
    """Let a rank of the pool call ``dist_checkpointing.save``, which starts processes.

    The ranks are daemons, which may have no children; and the manager process that Megatron starts for a queue would
    outlive a killed rank, so it gets a queue of this process, or in the background one that a forked process shares. The
    unchanged path is run by the end-to-end tests.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False
    filesystem_async._results_queue = multiprocessing.Queue() if in_background else queue.Queue()


def convert_folders(rank: int, world_size: int, jobs: list[tuple[Path, Path]]) -> None:
    """Convert (Hugging Face folder, checkpoint to write), on one rank, as the tool does it."""
    from megatron_gkd.checkpoint.hf import convert_hf_to_megatron

    assert world_size == 1
    allow_saving()
    with student_groups(DP) as groups:
        for folder, out in jobs:
            convert_hf_to_megatron(folder, out, groups, no_kernels(), torch.device("cpu"))
