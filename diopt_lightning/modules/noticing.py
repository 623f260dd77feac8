"""What a loss logs, and what it changes in metrics and buffers, counts once, however often a solver evaluates it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """Let a module work on copies of its buffers and of its metrics' states, which the graph of a loss may keep."""
    copies: dict[int, Any] = {}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in module.modules():
        places = [(part._buffers, list(part._buffers))]
        if isinstance(part, Metric):
            places.append((vars(part), list(part._defaults)))
        for place, names in places:
            before.append((place, dict(place)))
            # One that stands in two places is one there, too.
            place.update({name: copies.setdefault(id(place[name]), copied(place[name])) for name in names})
    try:
        yield
    finally:
        for place, values in before:
            place.update(values)


def copied(state: Any) -> Any:
    """A copy of a buffer, or of a state of a metric: a tensor or a list of tensors."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    return list(state) if isinstance(state, list) else state
