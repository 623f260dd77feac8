"""The model and the data module of a run that is over, made again from its configuration."""

import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from diopt_lightning.errors import ConfigurationError, one_line


class OptionParser(LightningArgumentParser):
    """A parser that says in one sentence which option is wrong, and why."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong; the parsers of nested options have theirs collected by the one of the command.

        Raises:
            ConfigurationError: Always, for the parser of a command.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise configuration_error(ex) or ConfigurationError(complaint(message)) from ex


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The user's mistake behind an error, which the parser wraps once for every class that it was making."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__
    return error


def complaint(message: str) -> str:
    r"""The option and the reasons in a message of the parser's, which also says what was tried, line by line.

    Example:
        >>> complaint('Parser key "data":\n  Errors:\n  - Expected a <class int>\n  Given value: a')
        '`data`: Expected a <class int>; see `--help`.'
    """
    frame = r"Does not validate|Subtypes:|Errors:|Given value|Problem with|Expected a (path|.*NoneType)|"
    frame += r"Not a valid subclass|Subclass types|a class path|a dict with"
    wrapping = r'Parser key "[^"]+":?|Type .* callable class: |\.*( Add the import path to |'
    wrapping += r" Got value: Namespace).*"
    lines = [re.sub(wrapping, "", line).strip(" -") for line in message.splitlines()]
    reasons = [line for line in lines if line and not re.match(frame, line)]
    option = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    said = " / ".join(dict.fromkeys(reasons)) or message
    return f"{f'`{option}`: ' if option else ''}{one_line(said).rstrip('.')}; see `--help`."


OPTIONS: dict[str, Any] = {
    "parser_class": OptionParser,
    "model_class": pl.LightningModule,
    "datamodule_class": pl.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    # Every level has an optimizer of its own, which `--optimizer` would replace.
    "auto_configure_optimizers": False,
}


class CheckedCLI(LightningCLI):
    """A command line whose configuration may be a stranger's: it makes objects of harmless classes alone."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that refuses `os`, `pickle` and others, by any name, and makes nothing where all is allowed.

        Nor does it read configurations from addresses, which Lightning has it do.
        """
        set_parsing_settings(
            import_path_denylist=[],
            instantiate_subclass_spec_in_any=False,
            config_read_mode_urls_enabled=False,
            config_read_mode_fsspec_enabled=False,
        )
        return super().init_parser(**kwargs)

    def before_instantiate_classes(self) -> None:
        """Refuse functions before anything is made."""
        check_classes(self.config.as_dict())


class NothingToRun(CheckedCLI):
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


def check_classes(options: Any, name: str = "") -> None:
    """Refuse a configuration that names something else where a class belongs, because it would be called.

    The parser checks of which class a class is, and takes any function, ``os.system`` too, for an optimizer.

    Raises:
        ConfigurationError: If it does.

    Example:
        >>> check_classes({"model": {"optimizer": {"class_path": "shutil.rmtree"}}})
        Traceback (most recent call last):
        ...
        diopt_lightning.errors.ConfigurationError: `model.optimizer` is `shutil.rmtree`, which is no class: give the ...
    """
    if isinstance(options, list | tuple):
        options = dict(enumerate(options))
    if not isinstance(options, dict):
        return
    path = options.get("class_path")
    if isinstance(path, str) and not inspect.isclass(locate(path)):
        raise ConfigurationError(
            f"`{name}` is `{path}`, which is no class: give the `class_path` of a class, such as `torch.optim.Adam`."
        )
    for key, value in options.items():
        check_classes(value, f"{name}.{key}" if name else str(key))
