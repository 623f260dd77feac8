"""What a loss logs, and what it changes in metrics and buffers, counts once, however often a solver evaluates it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric

from diopt_lightning.modules.local_checkpoints import LocalCheckpoints


class Noticing(LocalCheckpoints):
    """A module whose losses may be evaluated without notice."""

    _noticed = True

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Evaluate what is no training step's own: nothing is logged; buffers and metrics stay what they are."""
        noticed, self._noticed = self._noticed, False
        try:
            with copied_state(self):
                yield
        finally:
            self._noticed = noticed

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log a value, as Lightning does, unless it comes from an evaluation of a solver."""
        if self._noticed:
            super().log(*args, **kwargs)

    @property
    def logger(self) -> Any:
        """The first logger; one that does nothing for an evaluation of a solver."""
        return super().logger if self._noticed else DummyLogger()

    @property
    def loggers(self) -> list[Logger]:
        """All loggers; one that does nothing for an evaluation of a solver."""
        return super().loggers if self._noticed else [DummyLogger()]  # type: ignore[return-value]


@contextmanager
def copied_state(module: nn.Module) -> Iterator[None]:
    """Let a module work on copies of its buffers and of its metrics' states, which the graph of a loss may keep.

    Tensors and generators that are attributes count like buffers, and so does all that a metric keeps.
    """
    copies: dict[int, Any] = {}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    generators: dict[torch.Generator, Tensor] = {}
    for part in module.modules():
        own = vars(part)
        names = [name for name, value in own.items() if isinstance(value, Tensor)]
        generators |= {value: value.get_state() for value in own.values() if isinstance(value, torch.Generator)}
        if isinstance(part, Metric):
            names += [*part._defaults, "_computed", "_forward_cache"]
            names += [name for name, value in own.items() if isinstance(value, int | float)]
        for place, kept in ((part._buffers, list(part._buffers)), (own, names)):
            before.append((place, {name: place[name] for name in kept}))
            # One that stands in two places is one there, too.
            place.update({name: copies.setdefault(id(place[name]), copied(place[name])) for name in kept})
    try:
        yield
    finally:
        for place, values in before:
            place.update(values)
        for generator, state in generators.items():
            generator.set_state(state)


def copied(state: Any) -> Any:
    """A copy of a buffer, or of a state of a metric: a tensor or a list of tensors. What has a graph stays in it."""
    if isinstance(state, Tensor) and not state.requires_grad:
        return state.clone()
    return list(state) if isinstance(state, list) else state
