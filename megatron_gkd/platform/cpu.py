"""CPU substitutes for Megatron-Core's CUDA calls; it then runs unmodified with gloo.

Megatron-Core refers to the device in four ways: ``torch.cuda.*`` calls, the CUDA random generator, ``device="cuda"`` in
tensor factories, and ``torch.cuda.*Tensor`` type names. Each is mapped to the CPU by patching torch; patching Megatron
instead would replace about 37 call sites inside functions of up to 200 lines that move with every release.
Checked with torch 2.13.0 and megatron-core 0.16.1, and in part with 0.19.2.

Side effects in a patched process: ``torch.cuda.current_device()`` returns a ``torch.device`` and ``Tensor.type()`` a CUDA
type name.
"""

import contextlib
import functools
import os
import time
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
_MARK = "_megatron_gkd_cpu_stand_ins"


def install() -> bool:
    """Patch torch in this process before the first ``import megatron``.

    Returns:
        False if nothing was done, because CUDA is available or torch is patched already.
    """
    # the order matters: modules of Megatron run ``from torch.cuda import ...`` when they are imported
    if torch.cuda.is_available() or getattr(torch, _MARK, False):
        return False
    setattr(torch, _MARK, True)
    _cache_constructors()
    _replace_streams()
    _replace_generators()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    _name_cpu_types_like_cuda()
    _share_gloo_device()
    return True


def _cache_constructors() -> None:
    # torch caches its set of tensor constructors on first use. If that happens after the factories are wrapped,
    # ``with torch.device("meta")`` no longer matches the originals, and from_pretrained of transformers 5 leaves buffers
    # (rotary inv_freq) uninitialized: logits changed from run to run (torch 2.13.0).
    from torch.utils._device import _device_constructors

    _device_constructors()


def _on_cpu(factory):
    # for device="cuda" as in clip_grads.py:103 and schedules.py:596 (megatron-core 0.16.1)
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return on_cpu


def _name_cpu_types_like_cuda() -> None:
    # Megatron's bf16 and distributed optimizers group parameters by type() in ("torch.cuda.FloatTensor", ...) and raise
    # for any other name (optimizer.py:671, distrib_optimizer.py:361)
    type_of = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # pyright: ignore[reportAttributeAccessIssue]


class _Event:
    """CUDA event on the host's clock; all work on a CPU is synchronous."""

    def __init__(self, *args, **kwargs):
        self.time = 0.0

    def record(self, *args):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)

    def wait(self, *args):
        return None

    def synchronize(self, *args):
        return None


class _Stream(_Event):
    device = torch.device("cpu")

    def wait_stream(self, *args):
        return None

    def wait_event(self, *args):
        return None

    def record_event(self, event=None):
        return event or _Event()


def _replace_streams() -> None:
    stream = _Stream()
    cuda = torch.cuda
    cuda.Event, cuda.Stream = _Event, _Stream
    # one function object per name: torch._dynamo asserts "Duplicate torch object" otherwise
    cuda.current_stream = lambda *args: stream
    cuda.default_stream = lambda *args: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args: None


class _CpuGenerators:
    def __getitem__(self, index):
        return torch.default_generator


def _replace_generators() -> None:
    cuda = torch.cuda
    cuda.default_generators = _CpuGenerators()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed
    # Megatron sets its RNG tracker's state through it (tensor_parallel/random.py:55); torch would queue the call until
    # CUDA is initialized
    cuda._lazy_call = lambda fn, **kwargs: fn()


def _share_gloo_device() -> None:
    """Make all gloo groups of this process share one device, and so one network thread."""
    # torch 2.13 gives every gloo group a device of its own, whose thread wakes up a hundred times a second.
    # Megatron creates dozens of groups, also of a single rank: on two cores their threads took 60 % of the time of the
    # distributed tests. A gloo device serves any number of groups.
    if not dist.is_gloo_available():
        return
    group_class: Any = dist.ProcessGroupGloo
    original_init = group_class.__init__
    first_options: dict[int, Any] = {}  # by process id

    @functools.wraps(original_init)
    def init_on_shared_device(self, store, rank, size, *options, timeout=None, **named):
        if timeout is None:  # explicit options, or a call other than that of torch's new_group
            original_init(self, store, rank, size, *options, **named)
            return
        process = os.getpid()
        if process not in first_options:  # a forked process inherits the device object without its thread
            original_init(self, store, rank, size, timeout=timeout)
            first_options[process] = self.options
            return
        shared = group_class._Options()
        shared._devices, shared._threads = first_options[process]._devices, first_options[process]._threads
        shared._timeout = timeout
        original_init(self, store, rank, size, shared)

    group_class.__init__ = init_on_shared_device
