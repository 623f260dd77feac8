"""Runs that are told to stop end with a checkpoint."""

import os
import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn

from diopt_lightning.data.workers import ENDING
from diopt_lightning.resuming.messages import say
from diopt_lightning.resuming.unfinished_validation import validation_is_due

MANY = 2**24  # batches, where nobody knows how many


class Interrupted(SystemExit):
    """Ends a run that was told to stop, and the process with the exit status that shells expect: 128 + the signal.

    Args:
        number: The signal.
        main: Whether this is the process whose exit status counts. Lightning kills the main process if one that it has
            started ends with any other status than 0.
    """

    def __init__(self, number: int, main: bool = True) -> None:
        super().__init__(128 + number if main else 0)
        self.number = number


class Interruption(Callback):
    """Ends training with a checkpoint when the process gets SIGTERM, as of a preempted job, Ctrl-C, or the like.

    The like are SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU, unless they are ignored or somebody else handles them, and the
    signal at which Lightning asks SLURM to start the job again: that is done too, and the job goes on by itself. The
    checkpoint is written after the present batch, never within a step, where Lightning's own handler writes it, on all
    processes together even if one of them alone got the signal. A second Ctrl-C ends the process at once. Put it after
    callbacks that keep something in checkpoints.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}
        self._common = 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on: Lightning, which notes SIGTERM at the end of an epoch, has begun to listen before."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if told to."""
        if not validation_is_due(trainer):  # the checkpoint of its first batch tells that it was due
            self._stop_if_told_to(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how many batches all processes have, after which they can agree on something."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_start(trainer, pl_module)
        elif not trainer.sanity_checking:
            batches = torch.tensor(float(min(sum(trainer.num_val_batches), MANY)), device=pl_module.device)
            self._common = int(trainer.strategy.reduce(batches, reduce_op="min"))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Stop here if told to."""
        if self._common > 0:
            self._common -= 1
            self._stop_if_told_to(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals end an evaluation, or a prediction, at once: nothing is lost that a checkpoint could keep."""
        self._leave_alone()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if trainer.received_sigterm:
            signal.raise_signal(signal.SIGTERM)

    on_predict_start = on_test_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._leave_alone()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening; a signal for which there was no batch any more does what it does elsewhere."""
        self._leave_alone()
        received, self._received = self._received, 0
        if received and received != requeue_signal(trainer):  # a run that is done is not started again
            signal.raise_signal(received)

    def _listen(self, trainer: Trainer) -> None:
        """Note signals instead of ending at once."""
        if (
            self._before
            or getattr(trainer, "fast_dev_run", False)
            or threading.current_thread() is not threading.main_thread()
        ):
            return
        # Lightning has listened before, while loaders were made, and ends a run with neither checkpoint nor status.
        self._received = signal.SIGTERM if trainer.received_sigterm else 0
        for number in {*ENDING, requeue_signal(trainer)} - {None}:
            handler = signal.getsignal(number)
            if number in (signal.SIGTERM, signal.SIGINT) or handler == signal.SIG_DFL or of_lightning(handler):
                self._before[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one is meant seriously

    def _leave_alone(self) -> None:
        """Give signals back to whom they belonged."""
        for number, handler in self._before.items():
            if signal.getsignal(number) in (self._note, signal.default_int_handler):  # else Lightning has done so
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before, self._common = {}, 0

    def _stop_if_told_to(self, trainer: Trainer) -> None:
        """Save and raise, on all processes if one of them was told to."""
        if not self._before:
            return
        told = torch.tensor(float(self._received), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(told, reduce_op="max"))
        if not number:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if number == requeue_signal(trainer):
            trainer._signal_connector._slurm_sigusr_handler_fn(number, None)  # type: ignore[arg-type]
            path = Path(str(trainer._checkpoint_connector._hpc_resume_path))
        else:
            name = f"interrupted-epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
            path = folder / "checkpoints" / name
            trainer.save_checkpoint(path)
        stopped = f"Stopped by {name_of(number)} at step {trainer.global_step}."
        say(f"{stopped} To go on: {command(folder, path)}", below_the_bar=True)
        self._received = 0
        raise Interrupted(number, main=trainer.is_global_zero)


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal at which SLURM is asked to start a job again, if it is to be asked."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def of_lightning(handler: Any) -> bool:
    """Whether Lightning handles a signal, which saves wherever the run is just then."""
    return isinstance(handler, _HandlersCompose)


def name_of(number: int) -> str:
    """The name of a signal."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def command(folder: Path, path: Path) -> str:
    """What goes on with the run in a folder: a command line, if it came from one."""
    config = folder / "config.yaml"
    if config.is_file():
        below = config.resolve().is_relative_to(Path.cwd())
        place = os.path.relpath(config) if below else str(config)
        return shlex.join(["diopt", "fit", "--config", place, "--ckpt_path", "last"])
    return f'trainer.fit(..., ckpt_path="{path}")'
