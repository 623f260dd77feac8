"""Options that a resumed run changes: what it is given is kept in checkpoints, compared, and put into effect."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from diopt_lightning.resuming.messages import say
from diopt_lightning.resuming.training_state import check_kind

# Which checkpoint is gone on from, and what runs afterwards, are no properties of the run.
LEFT_OUT = ("config", "ckpt_path", "test_after_fit", "weights_only")

Options = dict[str, dict[str, Any]]


class KeptConfig(SaveConfigCallback):
    """Saves the configuration in the run's folder and in its checkpoints.

    A resumed run takes what it is given, on the command line or in files, and says where that differs from its
    checkpoint.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration."""
        checkpoint["config"] = self.plain_config

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what differs."""
        if trainer.state.fn == "fit" and "config" in checkpoint:
            say_what_is_changed(*(dict(entries(config)) for config in (checkpoint["config"], self.plain_config)))

    @cached_property
    def plain_config(self) -> dict[str, Any]:
        """The configuration as plain data."""
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return {name: value for name, value in config.items() if name not in LEFT_OUT}


class OptimizerOptions(Callback):
    """Lets a resumed run have the learning rates and other options that it is given, and says which have changed.

    Without it, those of the checkpoint replace them without a word. What training itself has changed is no difference:
    the options of both runs at their beginnings are compared. Where a schedule has moved a learning rate that is
    changed, it is changed by the same factor.
    """

    def __init__(self) -> None:
        self._given: Options = {}
        self._saved: Options = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the options as they are given, before those of a checkpoint replace them."""
        self._given = {name: numbers_and_names(options) for name, options in options_in_use(trainer).items()}
        if not trainer.ckpt_path:
            self._saved = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put changed ones into effect."""
        for name, options in options_in_use(trainer).items():
            saved, given = self._saved.get(name, {}), self._given.get(name, {})
            changed = {key: value for key, value in given.items() if key in saved and saved[key] != value}
            for key, value in changed.items():
                moved = key == "lr" and options[key] != saved[key] and saved[key]
                options[key] = options[key] * value / saved[key] if moved else value
            # A configuration has said so already, by the names that its user knows.
            if not any(isinstance(callback, KeptConfig) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                say_what_is_changed(*({f"{name}: {key}": each[key] for key in changed} for each in (saved, given)))

    def state_dict(self) -> dict[str, Any]:
        """Return the options as they were given."""
        return {"options": self._given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep those of the checkpoint for a comparison."""
        self._saved = {name: dict(options) for name, options in state_dict["options"].items()}
        for options in self._saved.values():
            if options.get("lr") is not None:
                check_kind(options["lr"], 0.0, "lr")


def say_what_is_changed(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Say which options are other ones than in a checkpoint, by their names."""
    for name in [*given, *(saved.keys() - given.keys())]:
        if saved.get(name) != given.get(name):
            say(f"`{name}` is {given.get(name)} and was {saved.get(name)} in the checkpoint: it is changed.")


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


def options_in_use(trainer: Trainer) -> Options:
    """The options of each group of each optimizer and of each scheduler, by names for messages."""
    groups = {
        f"group {j} of optimizer {i}": group
        for i, optimizer in enumerate(trainer.optimizers, start=1)
        for j, group in enumerate(optimizer.param_groups, start=1)
    }
    schedulers = {f"scheduler {i}": vars(c.scheduler) for i, c in enumerate(trainer.lr_scheduler_configs, start=1)}
    return groups | schedulers


def numbers_and_names(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that are numbers, names, or lists of numbers."""
    return {
        key: value
        for key, value in options.items()
        if isinstance(value, float | int | str | None)
        or (isinstance(value, list | tuple) and all(isinstance(entry, float | int) for entry in value))
    }
