"""The precision that losses are computed in, which is no matter of the solver's."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.amp import is_autocast_available


class Autocast:
    """The state of ``torch.autocast`` at one moment.

    Args:
        tensors: Tensors on the devices that it is about.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = sorted({kind for kind in ("cpu", *(x.device.type for x in tensors)) if is_autocast_available(kind)})
        self._states = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @property
    def dtype(self) -> torch.dtype | None:
        """What it casts to; ``None`` where it is off."""
        return next((dtype for _, dtype, enabled in reversed(self._states) if enabled), None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Cast as then, but keep no cast: parameters may have moved, and each graph is to be its own."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self._states:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Cast nothing."""
        with ExitStack() as stack:
            for kind, dtype, _ in self._states:
                stack.enter_context(torch.autocast(kind, dtype, enabled=False))
            yield
