"""The device of this process, selected once at start-up and logged with the reason."""

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
        device: Device of parameters and activations.
        collective_backend: Backend name for ``init_process_group``.
        reason: Reason for the choice, for the log.
    """

    device: torch.device
    collective_backend: str
    reason: str

    @property
    def is_cpu(self) -> bool:
        """Whether computation runs on the CPU."""
        return self.device.type == "cpu"

    def synchronize(self) -> None:
        """Wait for all kernels queued on the device."""
        # torch.accelerator.synchronize() raises on a machine without an accelerator (torch 2.13)
        if not self.is_cpu:
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Peak memory so far: device allocations, or resident set size on a CPU."""
        if self.is_cpu:
            # in KiB on Linux
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        return torch.cuda.max_memory_allocated()


def detect_platform() -> Platform:
    """Select CUDA with NCCL, or CPU with gloo without a GPU.

    On CUDA the process is bound to the GPU of its local rank.

    Raises:
        ConfigError: There are more local ranks than GPUs.
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
    """Prepare this process for Megatron-Core; call before the first ``import megatron``."""
    from megatron_gkd.platform import cpu

    platform = detect_platform()
    if platform.is_cpu:
        cpu.install()
    _quiet_imports()
    return platform


def _quiet_imports() -> None:
    # detect_kernels logs missing kernel libraries once; megatron-core 0.16.1 warns about them seven times per rank.
    # torch.distributed warns about the tensor-parallel API that Megatron's checkpoints still use.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
