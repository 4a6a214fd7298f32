"""Stand-ins for the CUDA calls inside Megatron-Core, so that it runs unmodified on a CPU with gloo.

Megatron-Core names the device in four ways: ``torch.cuda.*`` calls, the CUDA random generator,
``device="cuda"`` in tensor factories, and ``torch.cuda.*Tensor`` type names. Each is mapped to the CPU
once, in torch; no Megatron function is replaced. Checked with megatron-core 0.16.1. The gloo groups that stand in for NCCL's
share a network thread.

In a process prepared like this ``torch.cuda.current_device()`` returns a ``torch.device`` and
``Tensor.type()`` answers with a CUDA type name.
"""

import contextlib
import functools
import time

import torch

from megatron_gkd.platform import gloo

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
_MARK = "_megatron_gkd_cpu_stand_ins"


def install() -> bool:
    """Patch torch for this process; does nothing and returns False where CUDA is available or it ran before.

    Must run before the first ``import megatron``.
    """
    if torch.cuda.is_available() or getattr(torch, _MARK, False):
        return False
    setattr(torch, _MARK, True)
    _cache_constructors()
    _use_one_timeline()
    _use_one_generator()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    _name_cpu_types_like_cuda()
    gloo.share_device()
    return True


def _cache_constructors() -> None:
    # torch caches its set of tensor constructors on first use. If that happens after the factories are
    # wrapped, `with torch.device("meta")` no longer sees the originals and from_pretrained of transformers
    # leaves buffers (rotary inv_freq) as uninitialised memory.
    from torch.utils._device import _device_constructors

    _device_constructors()


def _on_cpu(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return on_cpu


def _name_cpu_types_like_cuda() -> None:
    # Megatron's optimizers sort parameters by type() == "torch.cuda.FloatTensor" and the like
    type_of = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # pyright: ignore[reportAttributeAccessIssue]


class _Event:
    """Event on the only timeline there is."""

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


def _use_one_timeline() -> None:
    stream = _Stream()
    cuda = torch.cuda
    cuda.Event, cuda.Stream = _Event, _Stream
    # one function object per name: torch._dynamo refuses the same object under many torch names
    cuda.current_stream = lambda *args: stream
    cuda.default_stream = lambda *args: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args: None


class _CpuGenerators:
    def __getitem__(self, index):
        return torch.default_generator


def _use_one_generator() -> None:
    cuda = torch.cuda
    cuda.default_generators = _CpuGenerators()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda._lazy_call = lambda fn, **kwargs: fn()
