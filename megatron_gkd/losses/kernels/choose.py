"""The back end with a given name."""

from collections.abc import Callable

from megatron_gkd.losses.kernels.compiled import COMPILED, CompiledKernels
from megatron_gkd.losses.kernels.eager import EAGER, EagerKernels
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.kernels.triton_launch import TritonWherePossible
from megatron_gkd.platform.compiler import can_compile


def _eager(rows_per_pass: int | None) -> DenseKernels:
    return EAGER if rows_per_pass is None else EagerKernels(rows_per_pass)


def _compiled_if_possible(rows_per_pass: int | None) -> DenseKernels:
    if not can_compile():
        return _eager(rows_per_pass)
    return COMPILED if rows_per_pass is None else CompiledKernels(rows_per_pass)


FACTORIES: dict[str, Callable[[int | None], DenseKernels]] = {
    "auto": lambda rows: TritonWherePossible(required=False, otherwise=_eager(rows)),
    "eager": _eager,
    "compiled": _compiled_if_possible,
    "triton": lambda rows: TritonWherePossible(required=True, otherwise=_eager(rows)),
}
"""Name -> what makes or finds the back end; called for every loss. A run that is long enough to compile names that."""

BACKENDS = tuple(FACTORIES)


def find_kernels(name: str, rows_per_pass: int | None = None) -> DenseKernels:
    """The back end called ``name``.

    ``auto`` is ``triton`` for logits on a GPU, else ``eager``; ``compiled`` is ``eager`` where nothing can be compiled.

    Args:
        name: One of ``BACKENDS``.
        rows_per_pass: Rows of one pass of ``eager`` and ``compiled``; ``None``: picked from the shapes.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in FACTORIES:
        raise ValueError(f"unknown loss back end {name!r}; it is one of {', '.join(BACKENDS)}")
    return FACTORIES[name](rows_per_pass)
