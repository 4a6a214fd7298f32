"""Which device this process computes on, chosen once at start-up and logged with its reason."""

import os
import resource
import warnings
from dataclasses import dataclass

import torch

from megatron_gkd.config import ConfigError

KIB = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Number formats by their name in ``train.precision``."""


@dataclass(frozen=True)
class Platform:
    """The device of this process.

    Attributes:
        device: Where parameters and activations live.
        collective_backend: Backend name for ``init_process_group``.
        reason: Why this device was chosen; goes into the log.
    """

    device: torch.device
    collective_backend: str
    reason: str

    @property
    def is_cpu(self) -> bool:
        """Whether computation runs on the CPU."""
        return self.device.type == "cpu"

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""
        if not self.is_cpu:
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Largest memory in use so far: device allocations on a GPU, resident set of the process on a CPU."""
        if self.is_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        return torch.cuda.max_memory_allocated()


def detect_platform() -> Platform:
    """CUDA with NCCL where a GPU is visible, CPU with gloo elsewhere. Binds this process to its local GPU.

    Raises:
        ConfigError: More ranks than GPUs were started.
    """
    if not torch.cuda.is_available():
        return Platform(torch.device("cpu"), "gloo", "no CUDA device is visible")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank} but only {torch.cuda.device_count()} CUDA devices are visible; "
            "start at most one rank per GPU (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    name = torch.cuda.get_device_name(local_rank)
    return Platform(torch.device("cuda", local_rank), "nccl", f"{name} is visible as device {local_rank}")


def prepare_process() -> Platform:
    """Make Megatron-Core usable in this process; call before the first ``import megatron``."""
    from megatron_gkd.platform import cpu

    platform = detect_platform()
    if platform.is_cpu:
        cpu.install()
    _quiet_imports()
    return platform


def _quiet_imports() -> None:
    # Which kernels are missing is logged once by us, with the reason; Megatron would say it seven times per rank.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
