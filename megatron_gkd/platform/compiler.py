"""Whether torch.compile or Triton works here, and the cache folder of what is compiled."""

import importlib.util
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@cache
def can_compile() -> bool:
    """Whether torch.compile works here; compiles one expression per process and logs a failure.

    The cache is ``sys.prefix/var/torch_inductor``, unless TORCHINDUCTOR_CACHE_DIR is set or that folder is not writable.
    """
    _choose_cache()
    try:
        # a TorchDispatchMode of the caller (FakeTensor, FLOP counting) would disable compilation
        with _disable_current_modes():
            torch.compile(_line, fullgraph=True, options={"compile_threads": 1})(torch.zeros(2))
    except (RuntimeError, OSError, ImportError) as error:
        log.warning(
            "Install a C++ compiler (g++), or set loss.backend=eager; torch.compile fails on this CPU, so the loss falls "
            "back to eager: %s",
            " ".join(str(error).split())[:300],
        )
        return False
    return True


def _line(x: Tensor) -> Tensor:
    return x.exp2() + 1


def _choose_cache() -> None:
    # torch's default folder is below /tmp, which many machines empty at boot
    if CACHE_VARIABLE in os.environ:
        return
    folder = Path(sys.prefix, "var", "torch_inductor")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[CACHE_VARIABLE] = str(folder)


@cache
def has_triton() -> bool:
    """Whether the package triton is installed; it is imported only where a kernel runs."""
    return importlib.util.find_spec("triton") is not None


@cache
def can_use_triton() -> bool:
    """Whether this machine has the package triton and an accelerator."""
    return torch.accelerator.is_available() and has_triton()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current for the launch of a Triton kernel, which goes to the current device whatever its tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
