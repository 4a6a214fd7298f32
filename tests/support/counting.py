"""Count what a piece of code allocates and communicates, operation by operation."""

import weakref
from dataclasses import dataclass, field

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Counts:
    """What ran inside ``counted``."""

    collectives: list[tuple[str, int]] = field(
        default_factory=list
    )  # (name, bytes that this rank contributes)
    largest_allocation: int = 0  # elements of the largest storage that an operation returned and no input had
    total_allocated: int = 0  # elements
    live_bytes: int = 0  # of new storages that something still holds
    peak_bytes: int = 0  # the most that ever lived at the end of an operation
    order: list[str] = field(
        default_factory=list
    )  # "product" (of two matrices) and "collective", as they began

    @property
    def products(self) -> int:
        """Number of products of two matrices."""
        return self.order.count("product")


class counted(TorchDispatchMode):
    """``with counted() as counts``: collectives and new storages of everything that runs, autograd included.

    What an operation allocates inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def __enter__(self) -> Counts:
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d":
            sent = min((tensor.nbytes for tensor in inputs), default=0)
            self.counts.collectives.append((func.overloadpacket.__name__, sent))
            self.counts.order.append("collective")
            return func(*args, **kwargs)
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.counts.order.append("product")
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.counts.largest_allocation = max(self.counts.largest_allocation, elements)
                self.counts.total_allocated += elements
                known.add(leaf.untyped_storage().data_ptr())  # one storage may be returned twice
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: UntypedStorage) -> None:
        """Count the storage until it is freed."""
        self.counts.live_bytes += storage.nbytes()
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.counts.live_bytes)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, num_bytes: int) -> None:
        self.counts.live_bytes -= num_bytes
