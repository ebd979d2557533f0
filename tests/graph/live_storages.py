"""`LiveStorages`: how many bytes of storages are alive, told by torch itself after every op."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages:
    """Counts the storages that ops make in the threads that are watched, until torch frees them.

    Example:
        >>> live = LiveStorages()
        >>> with live.watch():
        ...     x = torch.ones(4)
        ...     y = x + 1
        >>> live.now_bytes, live.peak_bytes
        (32, 32)
    """

    def __init__(self) -> None:
        self.now_bytes = self.peak_bytes = 0
        self._lock = threading.RLock()  # a storage may die while another is noted
        self._known: dict[int, int] = {}

    def watch(self) -> TorchDispatchMode:
        """A context in which this thread's ops are counted."""
        return _Watch(self)

    def note(self, storage: torch.UntypedStorage) -> None:
        with self._lock:
            key, num_bytes = storage._cdata, storage.nbytes()
            if num_bytes and key not in self._known:
                self._known[key] = num_bytes
                self.now_bytes += num_bytes
                self.peak_bytes = max(self.peak_bytes, self.now_bytes)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        with self._lock:
            self.now_bytes -= self._known.pop(key)


def storages_of(values: Any) -> dict[int, torch.UntypedStorage]:
    """All storages of the tensors in a pytree, by address."""
    tensors = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}


class _Watch(TorchDispatchMode):
    def __init__(self, live: LiveStorages) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = storages_of((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for address, storage in storages_of(result).items():
            if address not in before:
                self.live.note(storage)
        return result
