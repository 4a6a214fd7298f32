"""This process in its job, parallel layouts of models, and their process groups.

Ranks are ordered as in Megatron-Core: tensor-parallel varies fastest, then data-parallel, then pipeline-parallel.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.platform.device import Platform
from megatron_gkd.platform.kernels import Kernels

_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Job:
    """This process's rank in the job, and its device.

    Attributes:
        platform: Device and collective back end.
        kernels: Optional kernel libraries.
        rank: Rank in the job.
        size: Number of ranks in the job.
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
        """Device of this rank."""
        return self.platform.device

    @classmethod
    def of_process(cls, platform: Platform, kernels: Kernels) -> "Job":
        """The job described by torchrun's environment, or a job of one process without torchrun."""
        if not dist.is_torchelastic_launched():
            return cls(platform, kernels, rank=0, size=1)
        return cls(platform, kernels, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    def join(self) -> None:
        """Create the job's process group. Collective."""
        join_job(self.platform.collective_backend)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of one model over consecutive ranks.

    Attributes:
        tp_size: Tensor-parallel size.
        pp_size: Pipeline-parallel size.
        num_ranks: Number of ranks that hold the model, a multiple of ``tp_size * pp_size``.
        vpp_size: Virtual pipeline stages (chunks of layers) per rank; chunk v of stage 0 follows chunk v - 1 of the last.
    """

    tp_size: int
    pp_size: int
    num_ranks: int
    vpp_size: int = 1

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.num_ranks // (self.tp_size * self.pp_size)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, dp_rank, pp_rank) of a global rank."""
        tp_rank, rest = rank % self.tp_size, rank // self.tp_size
        return tp_rank, rest % self.dp_size, rest // self.dp_size

    def rank_at(self, *, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Global rank at these coordinates."""
        return tp_rank + self.tp_size * (dp_rank + self.dp_size * pp_rank)

    def last_stage_ranks(self, dp_rank: int) -> list[int]:
        """Global ranks of the last pipeline stage of one replica, in tensor-parallel order."""
        return [
            self.rank_at(tp_rank=t, dp_rank=dp_rank, pp_rank=self.pp_size - 1) for t in range(self.tp_size)
        ]


@dataclass(frozen=True)
class ModelGroups:
    """One model's layout with this rank's process groups and coordinates.

    Attributes:
        layout: The model's layout.
        pg: Megatron's ``ProcessGroupCollection``.
        tp_rank: This rank's tensor-parallel index.
        dp_rank: This rank's data-parallel index.
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
        """Whether this rank holds the final norm and, unless headless, the LM head."""
        return self.pp_rank == self.layout.pp_size - 1


def init_single_process(backend: str) -> None:
    """Initialize a process group of one rank, for commands started without torchrun."""
    # an in-process store opens no port, which env:// would
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented, not in __all__)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def join_job(backend: str) -> None:
    """Initialize the process group: all ranks started by torchrun, or this process alone."""
    if dist.is_torchelastic_launched():
        # generation and the teacher may keep ranks waiting in a collective for minutes, so no shorter than this
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    else:
        init_single_process(backend)


def init_student_groups(tp_size: int, pp_size: int, seed: int, vpp_size: int = 1) -> ModelGroups:
    """Create the student's process groups in Megatron's ``parallel_state``. Collective over all ranks."""
    # Megatron 0.16.1 needs parallel_state even if every group is passed explicitly: its memory buffer
    # (dot_product_attention.py:189) and its RNG tracker are global. So the student, the only model that trains, uses it,
    # and other models get groups of their own. The virtual pipeline size is not set there, as it would apply to all models.
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(tp_size, pp_size, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    layout = Layout(tp_size, pp_size, dist.get_world_size(), vpp_size)
    pg = ProcessGroupCollection.use_mpu_process_groups()
    return ModelGroups(layout, pg, *_coordinates(layout))


def make_model_groups(tp_size: int, pp_size: int) -> ModelGroups:
    """Create process groups of another model on all ranks. Collective over all ranks."""
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection

    # creating groups is collective: every rank must call this for every model in the same order
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
    pg.embd = pg.pos_embd = None  # needed only for the gradient of a tied embedding
    pg.hcp = pg.inter_dist_opt = pg.tp_dp_cp = None
    # GPTModel reads the expert groups also in a dense model (0.16.1), but never communicates in them
    pg.ep, pg.expt_tp, pg.expt_dp = pg.cp, pg.tp, pg.dp
    pg.tp_ep, pg.tp_ep_pp, pg.intra_dp_cp, pg.intra_expt_dp = pg.tp, pg.mp, pg.dp_cp, pg.dp
    return ModelGroups(layout, pg, *_coordinates(layout))


def _coordinates(layout: Layout) -> tuple[int, int, int]:
    return layout.coordinates(dist.get_rank())
