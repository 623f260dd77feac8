"""How much memory a computation holds at each of its operations, on any device."""

import weakref
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Moment = tuple[object, int]
"""An operation that has made something, forward or backward, and the bytes that are held after it."""


class LiveMemory(TorchDispatchMode):
    """Follows the memory of the tensors that are made in its context.

    Counts storages, from the operation that makes one until nothing holds it any more. That is what a program asks
    for, so it is the same on every device, and unlike an allocator's counter it exists on the CPU. What a kernel takes
    and returns within itself is not seen.

    Attributes:
        moments: What has been done so far, with the memory of what was made since the following began.

    Example:
        >>> import torch
        >>> with LiveMemory() as live:
        ...     a = torch.ones(1000)
        ...     a = a + 1
        >>> [size for _, size in live.moments]
        [4000, 8000]
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: list[Moment] = []
        self._size = 0
        self._known = weakref.WeakSet[UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        kwargs = kwargs or {}
        self._known.update(storages((args, kwargs)))  # made before this began, if it is not known yet
        result = func(*args, **kwargs)
        made = [storage for storage in storages(result) if storage not in self._known]
        for storage in made:
            self._known.add(storage)
            self._size += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes()).atexit = False
        if made:  # views are no moments: whether one is taken may depend on lengths
            self.moments.append((func, self._size))
        return result

    def _release(self, size: int) -> None:
        self._size -= size


def storages(values: Any) -> set[UntypedStorage]:
    """The storages of the tensors in any structure."""
    return {leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def stored(values: Any) -> int:
    """Bytes of the tensors in any structure, those in a shared storage counted once."""
    return sum(storage.nbytes() for storage in storages(values))


def growth(first: Sequence[Moment], second: Sequence[Moment]) -> list[int]:
    """How many bytes more a second run of a computation holds at each moment of the first.

    Normally both have the same moments. Where a solver takes another number of products in the second run, what comes
    before is compared and, counted from the end, what comes after. What lies between repeats that and gets 0.
    """

    def compared(pairs: Iterable[tuple[Moment, Moment]]) -> list[int]:
        same = takewhile(lambda pair: pair[0][0] is pair[1][0], pairs)
        return [more - few for (_, few), (_, more) in same]

    before = compared(zip(first, second, strict=False))
    after = compared(zip(reversed(first), reversed(second), strict=False))[: len(first) - len(before)]
    return [*before, *[0] * (len(first) - len(before) - len(after)), *reversed(after)]
