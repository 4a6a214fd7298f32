"""Whether torch.compile works on this machine's CPU, and where it keeps what it compiled."""

import logging
import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@cache
def can_compile() -> bool:
    """Compile a line, once for a process; if that fails, a warning says why.

    What is compiled is kept in ``sys.prefix/var/torch_inductor``, unless the user has set TORCHINDUCTOR_CACHE_DIR or may
    not write there: torch's own place is emptied when the machine starts.
    """
    _choose_cache()
    try:
        with _disable_current_modes():  # inside a dispatch mode nothing is compiled
            torch.compile(_line, fullgraph=True, options={"compile_threads": 1})(torch.zeros(2))
    except (RuntimeError, OSError, ImportError) as error:
        log.warning(
            "Nothing can be compiled for this CPU, so the loss runs in the eager back end; install a C++ compiler (g++), or "
            "set loss.backend=eager: %s",
            " ".join(str(error).split())[:300],
        )
        return False
    return True


def _line(x: Tensor) -> Tensor:
    return x.exp2() + 1


def _choose_cache() -> None:
    if CACHE_VARIABLE in os.environ:
        return
    folder = Path(sys.prefix, "var", "torch_inductor")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[CACHE_VARIABLE] = str(folder)
