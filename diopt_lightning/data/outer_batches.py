"""Several batches of the outer level at each step."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from diopt_lightning.data.collate import Batch, Collator
from diopt_lightning.data.sampling import Draw, TrainSampler


class JoinedBatches(TrainSampler):
    """A stream whose every element holds so many consecutive batches, one behind the other.

    Args:
        together: How many.
        *arguments: Those of :class:`~diopt_lightning.data.sampling.TrainSampler`.
        **options: The same.

    Example:
        >>> joined = JoinedBatches(2, lengths=[3, 1, 2, 4], batch_size=1, seed=0)
        >>> single = TrainSampler(lengths=[3, 1, 2, 4], batch_size=1, seed=0)
        >>> next(iter(joined)) == single.batch(0) + single.batch(1)
        True
    """

    def __init__(self, together: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.together = together

    def repeat(self, batches: float) -> None:
        """Repeat the batches of the first steps; see :class:`~diopt_lightning.data.sampling.TrainSampler`."""
        super().repeat(batches)
        self.repeated *= self.together

    def batch(self, step: int) -> list[Draw]:
        """The batches of this process at a step."""
        first = step * self.together
        return [draw for number in range(self.together) for draw in super(JoinedBatches, self).batch(first + number)]


class SplitCollator(Collator):
    """Makes a list of so many batches of rows that belong to them in equal numbers.

    Args:
        together: How many.
        pad_token_id: What stands where a source has ended.
    """

    def __init__(self, together: int, pad_token_id: int) -> None:
        super().__init__(pad_token_id)
        self.together = together

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[Batch]:  # type: ignore[override]
        """Collate each batch by itself."""
        size = len(rows) // self.together
        make = super().__call__
        return [make(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


@runtime_checkable
class WantsOuterBatches(Protocol):
    """A module that says how many batches of the outer level it wants at each step. Any other wants one."""

    outer_batches: int


def outer_batches(module: Any) -> int:
    """How many batches of the outer level a module wants at each step."""
    return module.outer_batches if isinstance(module, WantsOuterBatches) else 1
