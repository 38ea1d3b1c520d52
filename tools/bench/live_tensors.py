"""The bytes that tensors hold on a CPU while a function runs: what torch.cuda's allocator says of a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations make inside the context, forward and backward, until they are freed.

    Resident memory would count what the C library keeps of freed blocks as well, which differs from run to run. Left
    out is what an operation takes for itself while it runs, and storages that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Bytes alive now."""
        self.peak_bytes = 0
        """The most that were alive at once."""
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {_key(tensor) for tensor in _tensors((args, *(kwargs or {}).values()))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _key(tensor) not in before and _key(tensor) not in self._alive:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive.add(_key(tensor))
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._freed, _key(tensor), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
