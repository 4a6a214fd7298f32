"""The process in its job, layouts as frozen values, and the process groups that Megatron-Core needs for each model.

Ranks are numbered as Megatron does: tensor parallelism varies fastest, then data, then pipeline.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.platform.device import Platform
from megatron_gkd.platform.kernels import Kernels


@dataclass(frozen=True)
class Job:
    """This process in its job, and what it computes on.

    Attributes:
        platform: Device and collective back end.
        kernels: Optional kernel libraries.
        rank: Rank in the job.
        size: Ranks in the job.
    """

    platform: Platform
    kernels: Kernels
    rank: int
    size: int

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which sends requests to servers and writes the records."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.platform.device

    @classmethod
    def of_process(cls, platform: Platform, kernels: Kernels) -> "Job":
        """The place of this process as torchrun describes it; a job of one process without torchrun."""
        if not dist.is_torchelastic_launched():
            return cls(platform, kernels, rank=0, size=1)
        return cls(platform, kernels, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    def join(self) -> None:
        """Create the job's process group. Collective."""
        join_job(self.platform.collective_backend)


@dataclass(frozen=True)
class Layout:
    """How one model is spread over consecutive ranks.

    Attributes:
        tp_size: Tensor-parallel size.
        pp_size: Pipeline-parallel size.
        num_ranks: Ranks that carry the model, a multiple of ``tp_size * pp_size``.
        vpp_size: Chunks of layers on every pipeline stage; stage p of chunk v comes behind the last stage of chunk v - 1.
    """

    tp_size: int
    pp_size: int
    num_ranks: int
    vpp_size: int = 1

    @property
    def dp_size(self) -> int:
        """Number of copies of the model."""
        return self.num_ranks // (self.tp_size * self.pp_size)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, dp_rank, pp_rank) of a global rank."""
        tp_rank, rest = rank % self.tp_size, rank // self.tp_size
        return tp_rank, rest % self.dp_size, rest // self.dp_size

    def rank_at(self, *, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Global rank at these coordinates."""
        return tp_rank + self.tp_size * (dp_rank + self.dp_size * pp_rank)

    def last_stage_ranks(self, dp_rank: int) -> list[int]:
        """Global ranks of the last pipeline stage of one copy, in tensor-parallel order."""
        return [
            self.rank_at(tp_rank=t, dp_rank=dp_rank, pp_rank=self.pp_size - 1) for t in range(self.tp_size)
        ]


@dataclass(frozen=True)
class ModelGroups:
    """One model's layout, and this rank's process groups in it.

    Attributes:
        layout: The layout.
        pg: Megatron's ``ProcessGroupCollection``.
        tp_rank: This rank's tensor-parallel index.
        dp_rank: This rank's copy of the model.
        pp_rank: This rank's pipeline stage.
    """

    layout: Layout
    pg: Any
    tp_rank: int
    dp_rank: int
    pp_rank: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm (and the head, if any)."""
        return self.pp_rank == self.layout.pp_size - 1


def init_distributed(backend: str, timeout_s: float = 1800.0) -> None:
    """Join the job's process group, as described by torchrun's environment."""
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def init_single_process(backend: str) -> None:
    """A job of one rank, for tools that are started without torchrun; opens no port."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented, not in __all__)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def join_job(backend: str) -> None:
    """The process group of a command: all ranks that torchrun started, or this process alone."""
    if dist.is_torchelastic_launched():
        init_distributed(backend)
    else:
        init_single_process(backend)


def init_student_groups(tp_size: int, pp_size: int, seed: int, vpp_size: int = 1) -> ModelGroups:
    """Process groups of the student on all ranks, through Megatron's global state. Collective.

    Megatron needs its global state even where every group is passed explicitly (its memory buffer and random
    number tracker live there), so the student owns it and other models bring their own groups. The number of chunks
    stays out of it: it would hold for all models.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(tp_size, pp_size, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    layout = Layout(tp_size, pp_size, dist.get_world_size(), vpp_size)
    pg = ProcessGroupCollection.use_mpu_process_groups()
    return ModelGroups(layout, pg, *_coordinates(layout))


def destroy_student_groups() -> None:
    """Undo ``init_student_groups``, so that another layout can be tried in the same process. Collective."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    destroy_groups(groups)


def destroy_groups(pg: Any) -> None:
    """Close every process group of a ``ProcessGroupCollection``; each one left open keeps a thread and its sockets."""
    values = [
        group for value in vars(pg).values() for group in (value if isinstance(value, list) else [value])
    ]
    for group in {id(group): group for group in values if isinstance(group, dist.ProcessGroup)}.values():
        if group is not dist.group.WORLD and dist.get_process_group_ranks(group):
            dist.destroy_process_group(group)


def make_model_groups(tp_size: int, pp_size: int) -> ModelGroups:
    """Process groups of a further model on all ranks, independent of the student's. Collective."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

    layout = Layout(tp_size, pp_size, dist.get_world_size())
    grid = HyperCommGrid([tp_size, 1, layout.dp_size, pp_size], ["tp", "cp", "dp", "pp"])
    pg: Any = ProcessGroupCollection()
    pg.tp, pg.cp, pg.dp, pg.pp = (grid.create_pg(name) for name in ("tp", "cp", "dp", "pp"))
    pg.mp, pg.dp_cp, pg.tp_cp = (
        grid.create_pg(["tp", "pp"]),
        grid.create_pg(["cp", "dp"]),
        grid.create_pg(["tp", "cp"]),
    )
    pg.intra_dist_opt = grid.create_pg(["tp", "cp", "dp", "pp"])
    pg.embd = pg.pos_embd = None  # only a trained, tied model needs them
    pg.hcp = pg.inter_dist_opt = pg.tp_dp_cp = None
    # a dense model only looks the expert groups up
    pg.ep, pg.expt_tp, pg.expt_dp = pg.cp, pg.tp, pg.dp
    pg.tp_ep, pg.tp_ep_pp, pg.intra_dp_cp, pg.intra_expt_dp = pg.tp, pg.mp, pg.dp_cp, pg.dp
    return ModelGroups(layout, pg, *_coordinates(layout))


def _coordinates(layout: Layout) -> tuple[int, int, int]:
    return layout.coordinates(dist.get_rank())
