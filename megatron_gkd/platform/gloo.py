"""One network thread for all gloo groups of a process.

torch gives every gloo group a device of its own, whose thread wakes a hundred times a second. Megatron-Core makes dozens of
groups, even of one rank: on two cores their threads took more time than the computation. A device serves any number of
groups, so the later groups get the first one's.
"""

import functools
import os
from typing import Any


def share_device() -> None:
    """Let the gloo groups that this process makes from now on share a device; does nothing without gloo."""
    import torch.distributed as dist

    if not dist.is_gloo_available():
        return
    group_class: Any = dist.ProcessGroupGloo
    make = group_class.__init__
    first: dict[int, Any] = {}  # process -> options of its first group

    @functools.wraps(make)
    def make_on_one_device(self, store, rank, size, *options, timeout=None, **named):
        if timeout is None:  # options of the caller's own, or not made through torch's new_group
            make(self, store, rank, size, *options, **named)
            return
        process = os.getpid()
        if process not in first:  # a forked process has the object of the device, but not its thread
            make(self, store, rank, size, timeout=timeout)
            first[process] = self.options
            return
        shared = group_class._Options()
        shared._devices, shared._threads = first[process]._devices, first[process]._threads
        shared._timeout = timeout
        make(self, store, rank, size, shared)

    group_class.__init__ = make_on_one_device
