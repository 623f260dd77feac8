"""One checkpoint for all processes of a run."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.resuming.checkpoint_reading import understood
from diopt_lightning.resuming.processes import of_all_processes
from diopt_lightning.resuming.training_state import check_kind, check_training_state


class OneForAll(_CheckpointConnector):
    """Lets the first process choose the checkpoint, and gives it to those that do not have the same file.

    In Lightning each process looks for itself: of nodes with a disk each, one goes on and the others begin anew. It
    also hands out whatever a checkpoint says, which is looked at here before.

    Attributes:
        choose: What the first process calls to find the checkpoint, once; otherwise it is the path that it is given.
    """

    choose: Callable[[], str | None] | None = None

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Read the checkpoint.

        Raises:
            ConfigurationError: If the first process finds that it cannot be gone on from; on all of them.
        """
        choose, self.choose = self.choose, None
        found: Any = checkpoint_path
        if choose is not None and self.trainer.is_global_zero:
            try:
                found = choose()
            except ConfigurationError as error:
                found = error
        found = self.trainer.strategy.broadcast(found)
        if isinstance(found, ConfigurationError):
            raise found
        contents = of_all_processes(checksums(Path(found)) if found else None)
        # A sharded one is a folder, of which each process reads what is its own.
        if all(content == contents[0] for content in contents) or contents[0] is None:
            super().resume_start(found, weights_only)
            return
        if self.trainer.is_global_zero:
            super().resume_start(found, weights_only)
        self._ckpt_path = found
        self._loaded_checkpoint = self.trainer.strategy.broadcast(self._loaded_checkpoint)

    def restore_callbacks(self) -> None:
        """Give callbacks their states, if they are such."""
        states = self._loaded_checkpoint.get("callbacks", {})
        with understood(Path(str(self._ckpt_path))):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                known = type(callback).__module__.startswith(("diopt_lightning.", "lightning."))
                if known and callback.state_key in states:
                    check_kind(states[callback.state_key], callback.state_dict(), callback.state_key)
        super().restore_callbacks()

    def restore_training_state(self) -> None:
        """Give loops, optimizers and schedulers their states, if they are such."""
        if self._loaded_checkpoint and self.trainer.state.fn == TrainerFn.FITTING:
            with understood(Path(str(self._ckpt_path))):
                check_training_state(self.trainer, self._loaded_checkpoint)
        super().restore_training_state()


def checksums(path: Path) -> list[int] | None:
    """Those of the parts of a checkpoint, by which files of one name are told apart; ``None`` if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [part.CRC for part in archive.infolist()]
    except (OSError, zipfile.BadZipFile):
        return None
