"""Options of optimizers and schedulers that a resumed run changes."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

Options = dict[str, dict[str, Any]]


class OptimizerOptions(pl.Callback):
    """Lets a resumed run have the learning rates and other options that it is given, and says which have changed.

    Without it, those of the checkpoint replace them without a word. What training itself has changed is no difference:
    the options of both runs at their beginnings are compared. Where a schedule has moved a learning rate that is
    changed, it is changed by the same factor.
    """

    def __init__(self) -> None:
        self._given: Options = {}
        self._saved: Options = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the options as they are given, before those of a checkpoint replace them."""
        self._given = {name: plain(options) for name, options in every(trainer).items()}
        if not trainer.ckpt_path:
            self._saved = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put changed ones into effect."""
        for name, options in every(trainer).items():
            saved, given = self._saved.get(name, {}), self._given.get(name, {})
            for key in saved.keys() & given.keys():
                if saved[key] != given[key]:
                    rank_zero_info(f"`{key}` of {name} was {saved[key]} in the checkpoint and is {given[key]} now.")
                    moved = key == "lr" and options[key] != saved[key] and saved[key]
                    options[key] = options[key] * given[key] / saved[key] if moved else given[key]

    def state_dict(self) -> dict[str, Any]:
        """Return the options as they were given."""
        return {"options": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep those of the checkpoint for a comparison."""
        self._saved = state_dict["options"]


def every(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """The options of each group of each optimizer and of each scheduler, by names for messages."""
    groups = {
        f"group {j} of optimizer {i}": group
        for i, optimizer in enumerate(trainer.optimizers, start=1)
        for j, group in enumerate(optimizer.param_groups, start=1)
    }
    schedulers = {f"scheduler {i}": vars(c.scheduler) for i, c in enumerate(trainer.lr_scheduler_configs, start=1)}
    return groups | schedulers


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are numbers, names, or lists of numbers."""
    return {
        key: value
        for key, value in options.items()
        if isinstance(value, float | int | str | None)
        or (isinstance(value, list | tuple) and all(isinstance(entry, float | int) for entry in value))
    }
