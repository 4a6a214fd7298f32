"""SGLang plugin for CPUs without sgl-kernel, AMX or Triton kernels.

It registers an out-of-tree platform (``forward_native`` for every fused op, torch-native attention and KV allocator, gloo)
and hooks for seeded sampling and batched decode attention. No SGLang file is changed. SGLang finds the plugin by this
package's entry points in the groups ``sglang.srt.platforms`` and ``sglang.srt.plugins``, so the package must be installed;
SGLANG_PLATFORM selects it by the entry point's name, ``torch_cpu``. If CUDA is available it stays inactive unless
SGLANG_PLATFORM=torch_cpu. Written for sglang 0.5.23: 0.5.21 has another plugin interface, releases before 0.5.13 none.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

PLATFORM_NAME = "torch_cpu"


def activate() -> str | None:
    """Entry point of the platform plugin: the platform class's qualified name, or None if inactive."""
    if not _is_wanted():
        return None
    _stub_torchvision()
    return f"{__name__}:TorchCpuPlatform"


def register_hooks() -> None:
    """Entry point of the general plugin; SGLang calls it in every process before parsing arguments."""
    if not _is_wanted():
        return
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megatron_gkd.platform.batched_decode import decode_attention
    from megatron_gkd.platform.seeded_sampling import sample_with_seed

    # Without --enable-deterministic-inference SGLang ignores sampling_seed, and with it overrides.py:1117 admits only the
    # back ends of these lists, which are for GPUs. Torch-native attention has no split-KV, so its results repeat for the
    # same request.
    for name in (
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
    ):
        backends = getattr(choices, name, None)
        if backends is not None and "torch_native" not in backends:
            backends.append("torch_native")
    # batch_invariant_ops.py:1015 raises "No supported accelerator". Batch invariance is not provided on a CPU: with
    # another batch size ids repeated in 8 of 8 samples, log-probs in 0 to 5 of 8
    HookRegistry.register(
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode",
        lambda *args, **kwargs: None,
        HookType.REPLACE,
    )
    # the original needs murmur_hash of sgl_kernel, whose wheel needs libcuda.so.1
    HookRegistry.register(
        "sglang.srt.layers.sampler.multinomial_with_seed", sample_with_seed, HookType.REPLACE
    )
    HookRegistry.register(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode",
        decode_attention,
        HookType.AROUND,
    )


def _is_wanted() -> bool:
    import torch

    return not torch.cuda.is_available() or os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


class _StubModule(types.ModuleType):
    """A module whose public attributes are empty classes, created on access."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that provides stub modules for a package that is not installed."""

    def __init__(self, root: str):
        self.root = root

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == self.root:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StubModule(spec.name)

    def exec_module(self, module):
        module.__dict__["__version__"] = "0.0.0+stub"


def _stub_torchvision() -> None:
    """Provide a stub of torchvision, which SGLang's image models import at start-up."""
    # Text models never use it, and the torchvision wheel of PyPI links CUDA: beside a CPU build of torch it breaks
    # ``from transformers import Qwen3ForCausalLM`` ("operator torchvision::nms does not exist").
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # makes transformers cache "not available" before the stub exists
    sys.meta_path.append(_StubFinder("torchvision"))


def __getattr__(name: str) -> Any:
    """Create the platform class on first access, because its bases import sglang."""
    if name != "TorchCpuPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang.srt.platforms import interface
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum

    class TorchCpuPlatform(CpuDeviceMixin, interface.SRTPlatform):
        """CPU with plain PyTorch operations only."""

        _enum = PlatformEnum.OOT  # with CPU, the rotary embedding imports vllm
        device_name = device_type = "cpu"
        capabilities = interface.PlatformCapabilities()  # neither Triton nor CUDA graphs

        def get_default_attention_backend(self):
            return "torch_native"

        def get_dispatch_key_name(self):
            return "native"  # BaseFusedOp.forward_native everywhere

        def is_pin_memory_available(self, device=None):
            return False

    globals()[name] = TorchCpuPlatform
    return TorchCpuPlatform
