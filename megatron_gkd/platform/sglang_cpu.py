"""SGLang on a CPU without sgl-kernel, AMX or Triton kernels, through SGLang's own plugin interface.

An out-of-tree platform (every fused op falls back to ``forward_native``, torch-native attention and KV allocator, gloo)
and small hooks for seeded sampling and a faster decode step; no SGLang file is changed. SGLang finds both through the entry points
``sglang.srt.platforms`` and ``sglang.srt.plugins`` of this package, so the package must be installed. The name of the
entry point, ``torch_cpu``, is what SGLANG_PLATFORM selects. Where CUDA is available nothing is activated unless
SGLANG_PLATFORM=torch_cpu. Written for sglang 0.5.23; the interface differs in earlier releases.
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
    """Platform plugin: qualified name of the platform class, or None to stay out of the way."""
    if not _is_wanted():
        return None
    _stub_torchvision()
    return f"{__name__}:TorchCpuPlatform"


def register_hooks() -> None:
    """General plugin: runs in every SGLang process before its arguments are parsed."""
    if not _is_wanted():
        return
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megatron_gkd.platform.batched_decode import decode_attention
    from megatron_gkd.platform.seeded_sampling import sample_with_seed

    # torch-native attention computes one sequence at a time (no split-KV), so a seed per request is meaningful;
    # SGLang's lists name GPU back ends only
    for name in (
        "DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND",
    ):
        backends = getattr(choices, name, None)
        if backends is not None and "torch_native" not in backends:
            backends.append("torch_native")
    # batch-invariant GEMMs exist for GPUs only: this keeps just the seeded sampler, batch invariance is not provided
    HookRegistry.register(
        "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode",
        lambda *args, **kwargs: None,
        HookType.REPLACE,
    )
    # SGLang's own needs an op of sgl_kernel on CPU
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
    """Any public attribute is an empty class, made when asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves empty modules for an absent package."""

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
    """SGLang's image models import torchvision at start-up; text models never use it."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # caches "not available" before the stub exists
    sys.meta_path.append(_StubFinder("torchvision"))


def __getattr__(name: str) -> Any:
    """Builds the platform class on first use, since its bases import sglang."""
    if name != "TorchCpuPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang.srt.platforms import interface
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum

    class TorchCpuPlatform(CpuDeviceMixin, interface.SRTPlatform):
        """CPU with plain PyTorch operations only."""

        _enum = PlatformEnum.OOT  # out of tree: also skips an import of vllm in the rotary embedding
        device_name = device_type = "cpu"
        capabilities = interface.PlatformCapabilities()  # no Triton, no graphs

        def get_default_attention_backend(self):
            return "torch_native"

        def get_dispatch_key_name(self):
            return "native"  # BaseFusedOp.forward_native everywhere

        def is_pin_memory_available(self, device=None):
            return False

    globals()[name] = TorchCpuPlatform
    return TorchCpuPlatform
