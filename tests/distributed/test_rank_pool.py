"""The pool that all distributed tests rely on: it computes, it names what fails, and it recovers."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.rank_pool import PRELOADED, RankPool


def add_ranks(rank: int, world_size: int, expected: float) -> None:
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    assert x.item() == expected


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("boom")
    dist.barrier()


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def sleep_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def use_megatron_collectives(rank: int, world_size: int) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(world_size)
    try:
        assert parallel_state.get_tensor_model_parallel_rank() == rank
    finally:
        parallel_state.destroy_model_parallel()


def expect_imports(rank: int, world_size: int) -> None:
    assert PRELOADED in sys.modules


def test_a_rank_is_forked_from_a_process_that_has_imported_megatron(run_on_ranks):
    run_on_ranks(1, expect_imports)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ranks_see_each_other(run_on_ranks, n):
    run_on_ranks(n, add_ranks, n * (n - 1) / 2)


def test_megatron_runs_in_the_ranks(run_on_ranks):
    run_on_ranks(2, use_megatron_collectives)


def test_a_rank_that_dies_between_two_calls_is_noticed_and_the_pool_recovers():
    pool = RankPool(1)
    try:
        pool._processes[0].kill()
        pool._processes[0].join()
        with pytest.raises(AssertionError, match=r"died"):
            pool.run(add_ranks, 0.0)
        pool.run(add_ranks, 0.0)
    finally:
        pool.close()


def test_a_failing_or_dead_or_silent_rank_is_named_and_the_pool_recovers():
    pool = RankPool(2)
    try:
        with pytest.raises(AssertionError, match=r"rank 1 of 2 failed:\n(.|\n)*ValueError: boom"):
            pool.run(fail_on_rank_1)
        pool.run(add_ranks, 1.0)
        with pytest.raises(AssertionError, match=r"rank \d of 2 failed"):
            pool.run(die_on_rank_1)
        pool.run(add_ranks, 1.0)
        pool.timeout_s = 1.0
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not answer in 1 s"):
            pool.run(sleep_on_rank_1)
    finally:
        pool.close()
