"""Fixtures for all tests: gloo ranks, a run folder, tiny models; tests marked gpu are skipped without a CUDA
device."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.rank_pool import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[Callable[..., None]]:
    """``run_on_ranks(n, fn, *args)`` calls ``fn(rank, n, *args)`` on n gloo ranks that live for the whole
    session."""
    pools: dict[int, RankPool] = {}

    def run(n: int, fn: Callable[..., None], *args: object) -> None:
        if n not in pools:
            pools[n] = RankPool(n)
        pools[n].run(fn, *args)

    yield run
    for pool in pools.values():
        pool.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An empty folder for ``train.output_dir``."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama that tests read and never change."""
    from tests.support.tiny_models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny_llama"))
