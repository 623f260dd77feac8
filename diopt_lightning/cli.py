"""The command line: ``diopt fit | validate | test | predict``, and commands that train nothing."""

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diopt_lightning.callbacks import standard_callbacks
from diopt_lightning.errors import TrainingError, error_of_the_disk, one_line, printable
from diopt_lightning.rebuilding import OPTIONS, CheckedCLI, OptionParser, complaint, configuration_error
from diopt_lightning.resuming import (
    Interrupted,
    KeptConfig,
    OneForAll,
    WholeCheckpoints,
    find_checkpoint,
    read_checkpoint,
    take_a_folder,
)
from diopt_lightning.resuming.checkpoint_reading import UNREADABLE
from diopt_lightning.resuming.messages import say

# Beside Lightning's own: the module and the function of each, imported only when it is asked for. The function's
# arguments are the command's, and its docstring is the help.
COMMANDS = {
    "export": ("diopt_lightning.export", "export"),
    "instructions": ("diopt_lightning.inspection.command", "instructions"),
}

# Modules that hand on what they are given, to libraries, and what those raise for what is wrong with it.
HANDING_ON = (__name__, "diopt_lightning.rebuilding")
LIBRARIES = {"lightning", "lightning_utilities", "torch", "torchmetrics", "transformers", "datasets", "fsspec"}
LIBRARIES |= sys.stdlib_module_names
# Where Lightning hands out what a checkpoint holds, which may be a stranger's.
RESTORING = {
    ("lightning.pytorch.trainer.connectors.checkpoint_connector", name)
    for name in ("resume_start", "restore_datamodule", "_restore_modules_and_callbacks", "restore_training_state")
}
COMPLAINTS = (MisconfigurationException, ValueError, RuntimeError, OSError, ImportError, ZeroDivisionError)


class DioptCLI(CheckedCLI):
    """LightningCLI with a test run after fitting, where asked for, and runs that go on after an interruption."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the project's own arguments."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Run the test tasks with the final weights after fitting.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make a trainer, whose checkpoints are whole unless a plugin of the user's own writes them.

        All its processes go on from the same one.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        trainer._checkpoint_connector = OneForAll(trainer)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is given; Lightning's own method puts what is in a checkpoint in its place."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand, during which its folders are its own."""
        with ExitStack() as self._folders:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Put a path in the place of the checkpoint ``last``, and refuse what is none before anything is built.

        Where there are several processes, the first of them does so, once they know each other.
        """
        subcommand = str(self.subcommand)
        options, root = self.config_init[subcommand], Path(self.trainer.default_root_dir)
        if self.trainer.world_size == 1:
            options["ckpt_path"] = find_checkpoint(options["ckpt_path"], root, subcommand == "fit")
        elif options["ckpt_path"] is not None:
            connector: Any = self.trainer._checkpoint_connector
            connector.choose = partial(find_checkpoint, options["ckpt_path"], root, subcommand == "fit")
            options["ckpt_path"] = None
        self._folders.enter_context(take_a_folder(self.trainer))

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Say if there was nothing left to do, and run the test tasks if asked for."""
        given = self.trainer.ckpt_path
        if given and Path(given).is_file() and read_checkpoint(Path(given))["global_step"] == self.trainer.global_step:
            say(
                f"The run was finished already, at step {self.trainer.global_step}: raise `trainer.max_epochs` or "
                "`trainer.max_steps` to go on with it."
            )
        if self.config["fit"]["test_after_fit"] and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def run(args: ArgsType = None) -> DioptCLI:
    """Parse arguments and run the subcommand.

    Args:
        args: Arguments of the command line, as a list of strings. Default: those of the process.
    """
    return DioptCLI(
        **OPTIONS,
        parser_kwargs={"epilog": f"What trains nothing, each with its own --help: diopt {' | '.join(COMMANDS)}"},
        seed_everything_default=0,
        trainer_defaults={"callbacks": standard_callbacks()},
        save_config_callback=KeptConfig,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def run_command(name: str, args: Sequence[str]) -> None:
    """Parse the arguments of one of ``COMMANDS`` and call its function."""
    module, function = COMMANDS[name]
    called = getattr(import_module(module), function)
    # Not `auto_cli`, which keeps an argument named `config` to itself.
    parser = OptionParser(prog=f"diopt {name}", description=called.__doc__.splitlines()[0])
    parser.add_function_arguments(called, as_group=False, as_positional=True)
    called(**parser.parse_args(list(args)).as_dict())


def main(args: Sequence[str] | None = None) -> int:
    """Run ``diopt``; what a user can mend ends with one line on the standard error and exit status 2.

    A run that cannot go on ends with one line too, and status 1. A run that is stopped ends with the status that shells
    expect: 130 after Ctrl-C, and 143 after SIGTERM.
    """
    # PyTorch's own deprecation, met by Lightning whenever it moves a batch.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # Said where there are no dev tasks, as asked for.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # Checkpoints are meant to have the model after the step that they are named after.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    given = list(args) if args is not None else sys.argv[1:]
    try:
        if given and given[0] in COMMANDS:
            run_command(given[0], given[1:])
        else:
            run(list(args) if args is not None else None)
    except Interrupted as stopped:
        return int(stopped.code or 0)
    except (KeyboardInterrupt, SystemExit) as stopped:
        # What Lightning makes of an interruption before there is something to save.
        if not isinstance(stopped, KeyboardInterrupt) and not isinstance(stopped.__context__, KeyboardInterrupt):
            raise
        print("diopt: Stopped before there was anything to save.", file=sys.stderr)
        return 128 + signal.SIGINT
    except torch.OutOfMemoryError as error:
        advice = "lower `data.batch_size`, or raise `model.micro_batches`."
        print(f"diopt: error: {one_line(error, 150)}: {advice}", file=sys.stderr)
        return 1
    except TrainingError as error:
        print("diopt: error:", printable(str(error), keep="\n"), file=sys.stderr)
        return 1
    except Exception as error:
        mistake, disk = configuration_error(error), error_of_the_disk(error)
        if mistake is None and disk is not None:
            place = printable(f"{disk.filename or 'a file'} ({disk.strerror})")
            print(
                f"diopt: error: Cannot write or read {place}: make room, or set `trainer.default_root_dir` and "
                "`data.cache_dir` to folders that can be written to.",
                file=sys.stderr,
            )
            return 1
        said = mistake or libraries_complaint(error)
        if said is None:
            raise
        print("diopt: error:", printable(str(said), keep="\n"), file=sys.stderr)
        return 2
    return 0


def libraries_complaint(error: Exception) -> str | None:
    """What Lightning or another library has against a configuration, in one line; ``None`` if it may be a bug.

    The command line and the parser hand on what was given. If from there on libraries alone were at work when the
    error was raised, and they raised it on purpose or it is of such a kind, then what they were given is at fault. If
    code of this package or of the user's own was at work, its author needs the traceback. (Where this package calls
    libraries with what users have given, it says itself what their errors mean.)
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    places = {(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames}
    if isinstance(error, UNREADABLE) and RESTORING & places:
        return (
            f"The checkpoint does not hold what a run of this configuration has saved ({type(error).__name__}: "
            f"{one_line(error)}): give another one, or the configuration that it was written with."
        )
    rooms = [name.partition(".")[0] for name in names]
    handed = max(i for i, name in enumerate(names) if name in HANDING_ON or rooms[i] == "jsonargparse")
    after = rooms[handed + 1 :]
    on_purpose = (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise ")
    if not (on_purpose or isinstance(error, COMPLAINTS)) or not LIBRARIES.issuperset(after):
        return None
    if rooms[-1] == "jsonargparse":
        return complaint(str(error))
    return f"{one_line(error, 500)} (says {after[-1]})" if after else None
