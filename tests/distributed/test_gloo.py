"""The gloo groups of a rank share one network thread."""

import datetime
from pathlib import Path

import torch
import torch.distributed as dist


def check_groups(rank: int, world_size: int) -> None:
    limit = datetime.timedelta(seconds=37)
    for _ in range(2):  # groups that end leave the thread to those that come
        groups = [dist.new_group(timeout=limit) for _ in range(5)]
        pending = [
            dist.all_reduce(torch.full((3,), float(rank)), group=group, async_op=True) for group in groups
        ]
        for work in pending:
            assert work is not None
            work.wait()
            assert work.result()[0].tolist() == [world_size * (world_size - 1) / 2] * 3
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        assert names.count("gloo_tcp_loop") == 1
        for group in groups:
            assert group is not None
            assert group._get_backend(torch.device("cpu")).options._timeout == limit
            dist.destroy_process_group(group)


def check_options(rank: int, world_size: int) -> None:
    """A caller's own options are left alone."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    options._threads = 3
    store = dist.PrefixStore("own", dist.distributed_c10d._get_default_store())
    assert dist.ProcessGroupGloo(store, rank, world_size, options).options._threads == 3


def test_groups_share_a_network_thread_and_keep_their_time_limits(run_on_ranks):
    run_on_ranks(2, check_groups)


def test_a_group_with_options_keeps_them(run_on_ranks):
    run_on_ranks(2, check_options)
