"""Counting the bytes of the tensors that are alive while code runs."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from torchtrain.tools.preflight.allocator import Change


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated while it is entered, also of fake tensors, which have no memory.

    An operation allocates those of its results that share no storage with its arguments. What a
    kernel allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes that are alive."""
        self.peak = 0
        """Most of them since the phase began."""
        self.changes: list[Change] = []
        """Tensors that came and went, in order."""
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        """By which `changes` tells the storages that are alive apart."""

    def begin_phase(self) -> int:
        """Return the peak so far, and begin to look for that of what follows."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count what it allocates."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # its operations on local tensors come here, too
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(each.untyped_storage()) for each in list_tensors((args, kwargs))}
        for tensor in list_tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._sizes:
                self._add(storage)
        return result

    def resize(self, storage: UntypedStorage) -> None:
        """Take note that a storage has another size than it had, if it is counted."""
        key = id(storage)
        if key in self._sizes:
            self._remove(key)
            self._count(key, storage.nbytes())

    def _add(self, storage: UntypedStorage) -> None:
        key = id(storage)
        self._count(key, storage.nbytes())
        weakref.finalize(storage, self._remove, key)

    def _count(self, key: int, size: int) -> None:
        self._sizes[key] = size
        self._numbers[key] = len(self.changes)
        self.changes.append(Change(len(self.changes), size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        self.changes.append(Change(self._numbers.pop(key), 0))


def list_tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
