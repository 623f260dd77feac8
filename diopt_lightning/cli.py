"""The command line: ``diopt fit | validate | test | predict``, and commands that train nothing."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from diopt_lightning.callbacks import RandomState, Results
from diopt_lightning.errors import ConfigurationError

# Beside Lightning's own: the module and the function of each, imported only when it is asked for. The function's
# arguments are the command's, and its docstring is the help.
COMMANDS = {
    "export": ("diopt_lightning.export", "export"),
}


class DioptCLI(LightningCLI):
    """LightningCLI with a test run after fitting, where asked for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's own arguments."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Run the test tasks with the final weights after fitting.",
        )

    def after_fit(self) -> None:
        """Run the test tasks if asked for."""
        if self.config["fit"]["test_after_fit"] and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def run(args: ArgsType = None) -> DioptCLI:
    """Parse arguments and run the subcommand.

    Args:
        args: Arguments of the command line, as a list of strings. Default: those of the process.
    """
    return DioptCLI(
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        # Every level has an optimizer of its own, which `--optimizer` would replace.
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [RandomState(), Results()]},
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def run_command(name: str, args: Sequence[str]) -> None:
    """Parse the arguments of one of ``COMMANDS`` and call its function."""
    module, function = COMMANDS[name]
    called = getattr(import_module(module), function)
    # Not `auto_cli`, which keeps an argument named `config` to itself.
    parser = ArgumentParser(prog=f"diopt {name}", description=called.__doc__.splitlines()[0])
    parser.add_function_arguments(called, as_group=False, as_positional=True)
    called(**parser.parse_args(list(args)).as_dict())


def main(args: Sequence[str] | None = None) -> int:
    """Run ``diopt``; what a user can mend ends with one line on the standard error and exit status 2."""
    # PyTorch's own deprecation, met by Lightning whenever it moves a batch.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    given = list(args) if args is not None else sys.argv[1:]
    try:
        if given and given[0] in COMMANDS:
            run_command(given[0], given[1:])
        else:
            run(list(args) if args is not None else None)
    except ValueError as error:
        mistake = configuration_error(error)
        if mistake is None:
            raise
        print(f"diopt: error: {mistake}", file=sys.stderr)
        return 2
    return 0


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The user's mistake behind an error, which the parser wraps once for every class that it was making."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__
    return error
