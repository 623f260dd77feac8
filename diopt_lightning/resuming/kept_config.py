"""The configuration of a run in its checkpoints."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from diopt_lightning.resuming.checkpoint_finding import say

# Which checkpoint is gone on from, and what runs afterwards, are no properties of the run.
LEFT_OUT = ("config", "ckpt_path", "test_after_fit", "weights_only")


class KeptConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder and in its checkpoints.

    A resumed run takes what it is given, on the command line or in files, and says where that differs from its
    checkpoint.
    """

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration."""
        checkpoint["config"] = self.plain

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say what differs."""
        if trainer.state.fn != "fit":
            return
        saved, given = (dict(entries(config)) for config in (checkpoint.get("config", {}), self.plain))
        for name in [*given, *(saved.keys() - given.keys())] if saved else []:
            if saved.get(name) != given.get(name):
                say(f"`{name}` is {given.get(name)} and was {saved.get(name)} in the checkpoint: it is changed.")

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The configuration as plain data."""
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return {name: value for name, value in config.items() if name not in LEFT_OUT}


def entries(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All entries of nested options, by names with dots.

    Example:
        >>> dict(entries({"model": {"lr": 1, "betas": [2, 3]}}))
        {'model.lr': 1, 'model.betas': [2, 3]}
    """
    if not isinstance(config, dict) or not config:
        yield name, config
        return
    for key, value in config.items():
        yield from entries(value, f"{name}.{key}" if name else str(key))
