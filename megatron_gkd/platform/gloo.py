"""One network thread for all gloo groups of a process.

torch gives every gloo group a device of its own, whose thread wakes a hundred times a second. Megatron-Core makes dozens of
groups, even of one rank: on two cores their threads took more time than the computation. A device serves any number of
groups, so the later groups get the first one's.
"""

import functools
from typing import Any


def share_device() -> None:
    """Let the gloo groups that this process makes from now on share a device; does nothing without gloo."""
    import torch.distributed as dist

    if not dist.is_gloo_available():
        return
    group_class: Any = dist.ProcessGroupGloo
    make, first = group_class.__init__, []

    @functools.wraps(make)
    def make_on_one_device(self, store, rank, size, *options, timeout=None):
        if timeout is None:  # options of the caller's own
            make(self, store, rank, size, *options)
        elif not first:
            make(self, store, rank, size, timeout=timeout)
            first.append(self.options)
        else:
            shared = group_class._Options()
            shared._devices, shared._threads, shared._timeout = first[0]._devices, first[0]._threads, timeout
            make(self, store, rank, size, shared)

    group_class.__init__ = make_on_one_device
