"""Steps that are not taken because a value is not finite, and outer steps that stand out."""

import statistics
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from diopt_lightning.bilevel import ConvergenceWarning
from diopt_lightning.errors import TrainingError

# An outer norm is compared with the median of so many before it, from a few on, and is said to explode at a multiple.
REMEMBERED, FEW, EXPLODED = 50, 10, 100.0


class SkippedSteps:
    """Counts steps that were skipped, and ends a run that skips many in a row.

    A step along a value that is not finite would destroy all parameters, and one bad batch is no reason to end a run.

    Args:
        limit: Steps in a row that may be skipped.

    Attributes:
        total: Steps that were skipped, by level.
        in_a_row: Steps that were skipped since the last one that was taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = {"inner": 0, "outer": 0}
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"total": dict(self.total), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.total, self.in_a_row = dict(state["total"]), state["in_a_row"]

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skip(self, level: str, why: str, module: LightningModule) -> None:
        """Count a step of a level that is not taken, and say why; the module logs the count.

        Raises:
            TrainingError: If it is one too many.
        """
        self.total[level] += 1
        self.in_a_row += 1
        rank_zero_warn(f"Skipped an {level} step ({self.in_a_row} in a row, {sum(self.total.values())} in all): {why}")
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row were skipped (`skip_limit`), the last one because: {why} "
                f"{last_checkpoint(module.trainer)} Lower the learning rates or the solver's step size before going on."
            )
        module.log(f"skipped_{level}_steps", float(self.total[level]))


class OuterNorms:
    """Warns of a hypergradient that is far larger than those before it."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=REMEMBERED)

    def see(self, norm: float) -> None:
        """Compare the norm of a hypergradient with the ones before it."""
        if len(self._norms) >= FEW:
            median = statistics.median(self._norms)
            if norm > EXPLODED * median > 0:
                warnings.warn(
                    f"The hypergradient's norm is {norm:.3g}, {norm / median:.0f} times its median over the last "
                    f"{len(self._norms)} outer steps. `hypergradient/residual` says whether its solver converges: "
                    "if so, lower the learning rate of the outer level.",
                    ConvergenceWarning,
                    stacklevel=2,
                )
        self._norms.append(norm)


def last_checkpoint(trainer: Trainer) -> str:
    """A sentence that names the newest checkpoint of a run."""
    named = [
        Path(path)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in (callback.last_model_path, callback.best_model_path, *callback.best_k_models)
        if path
    ]
    there = [path for path in named if path.exists()]
    if not there:
        return "No checkpoint has been written."
    return f"The last checkpoint is {max(there, key=lambda path: path.stat().st_mtime)}."
