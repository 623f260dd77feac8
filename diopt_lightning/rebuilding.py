"""The model and the data module of a run that is over, made again from its configuration."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from diopt_lightning.errors import ConfigurationError

OPTIONS: dict[str, Any] = {
    "model_class": pl.LightningModule,
    "datamodule_class": pl.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    # Every level has an optimizer of its own, which `--optimizer` would replace.
    "auto_configure_optimizers": False,
}


class NothingToRun(LightningCLI):
    """The objects of a run alone, without what is said at its beginning."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the given arguments; Lightning's own method warns where the process has some too."""
        self.config = parser.parse_object(args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make a trainer, which says which devices it found."""
        logging.disable(logging.INFO)
        try:
            return super().instantiate_trainer(**kwargs)
        finally:
            logging.disable(logging.NOTSET)


def instantiate(config: Path, changes: Mapping[str, Any] | None = None) -> LightningCLI:
    """Make the model and the data module of a run from the ``config.yaml`` in its folder, without running anything.

    Args:
        config: The file.
        changes: Options of the data module to replace, e.g. ``{"root": "elsewhere"}``.

    Returns:
        An object with the attributes ``model``, ``datamodule`` and ``trainer``, attached to each other as in a run.

    Raises:
        ConfigurationError: If the file is missing or is not that of a run.
    """
    try:
        options = yaml.safe_load(config.read_text(encoding="utf-8"))
        parts = {"model": options["model"], "data": options["data"]}
        parts["data"]["init_args"] = {**parts["data"].get("init_args", {}), **(changes or {})}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{config} is not the configuration of a run ({type(error).__name__}: {' '.join(str(error).split())}): "
            "give the `config.yaml` of the run's folder as `config`."
        ) from error
    local = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    cli = NothingToRun(**OPTIONS, seed_everything_default=False, trainer_defaults=local, args=parts, run=False)
    cli.datamodule.trainer = cli.model.trainer = cli.trainer
    cli.trainer.datamodule = cli.datamodule  # type: ignore[attr-defined]
    # What the data module asks the module for, as how its model reads texts, it finds by way of the trainer.
    cli.trainer.strategy.connect(cli.model)
    return cli
