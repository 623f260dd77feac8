"""How much memory a computation holds at each of its operations, on any device."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moment(NamedTuple):
    """What is held after an operation that has made something.

    Args:
        operation: The operation, forward or backward.
        size: Bytes that are held by tensors made since the following began.
        level: :attr:`LiveMemory.level` at that moment.
    """

    operation: object
    size: int
    level: str


class LiveMemory(TorchDispatchMode):
    """Follows the memory of the tensors that are made in its context.

    Counts storages, from the operation that makes one until nothing holds it any more. That is what a program asks
    for, so it is the same on every device, and unlike an allocator's counter it exists on the CPU. What a kernel takes
    and returns within itself is not seen.

    Attributes:
        moments: The operations so far that have made something.
        size: Bytes that are held now.
        level: A mark that moments get, for the caller to set.

    Example:
        >>> import torch
        >>> with LiveMemory() as live:
        ...     a = torch.ones(1000)
        ...     a = a + 1
        >>> [moment.size for moment in live.moments], live.size
        ([4000, 8000], 4000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: list[Moment] = []
        self.size = 0
        self.level = ""
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            self._met(tensor, 0)  # made before this began, if it is not known yet
        result = func(*args, **kwargs)
        # Views are no moments: whether one is taken may depend on lengths.
        if sum(self._met(tensor, tensor.untyped_storage().nbytes()) for tensor in tensors_in(result)):
            self.moments.append(Moment(func, self.size, self.level))
        return result

    def _met(self, tensor: Tensor, size: int) -> bool:
        """Count a tensor's storage until its end, unless it is counted already; say whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        self._known.add(key)
        self.size += size
        weakref.finalize(storage, self._forget, key, size).atexit = False
        return True

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.size -= size

    @property
    def peak(self) -> int:
        """The most that was held at once."""
        return max((moment.size for moment in self.moments), default=0)


def tensors_in(values: Any) -> Iterable[Tensor]:
    """The tensors in arguments or results of an operation."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def aligned(first: Sequence[Moment], second: Sequence[Moment]) -> Iterator[tuple[Moment, Moment]]:
    """The moments of two runs of a computation at which both had done the same.

    Normally that is all of them. A solver may take another number of products in the second run; then it is what comes
    before and, counted from the end, what comes after. What lies between repeats operations that came before.
    """
    if len(first) == len(second):
        yield from zip(first, second, strict=True)
        return

    def same(pair: tuple[Moment, Moment]) -> bool:
        return pair[0].operation is pair[1].operation

    yield from takewhile(same, zip(first, second, strict=False))
    yield from takewhile(same, zip(reversed(first), reversed(second), strict=False))
