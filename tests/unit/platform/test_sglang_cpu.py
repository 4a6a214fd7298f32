"""The plug-in as SGLang sees it, without a server; a server with it runs in tests/e2e/test_sglang_server.py."""

import importlib.metadata
import sys

import pytest

from megatron_gkd.platform import sglang_cpu


@pytest.mark.parametrize("group", ["sglang.srt.platforms", "sglang.srt.plugins"])
def test_sglang_finds_the_plugin_by_its_entry_points(group):
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}
    assert callable(entries[sglang_cpu.PLATFORM_NAME].load())


def test_a_machine_with_cuda_is_left_alone_unless_the_platform_is_asked_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert sglang_cpu.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", sglang_cpu.PLATFORM_NAME)
    monkeypatch.setattr(sglang_cpu, "_stub_torchvision", lambda: None)
    assert sglang_cpu.activate() == "megatron_gkd.platform.sglang_cpu:TorchCpuPlatform"


def test_stubs_serve_any_submodule_and_class_of_the_absent_package(monkeypatch):
    finder = sglang_cpu._StubFinder("surely_absent_package")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    import surely_absent_package.transforms.functional as stub  # pyright: ignore[reportMissingImports]

    assert isinstance(stub.Resize, type)
    assert stub.__version__.endswith("stub")
    assert finder.find_spec("another_package") is None
