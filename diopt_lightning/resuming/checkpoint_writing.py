"""How checkpoints of a run are written and read."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diopt_lightning.data.files import refuse_address, remote
from diopt_lightning.errors import TrainingError, error_of_the_disk
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint

Place = str | Path


class WholeCheckpoints(TorchCheckpointIO):
    """Leaves no half-written checkpoint behind, whenever the process ends, and loads no damaged one.

    A checkpoint is written aside in its own folder, flushed to the disk, and only then given its name. (Lightning 2.6
    writes aside and moves too, but into the system's folder for temporary files: from another file system the move is a
    copy over the file of that name, which can be cut short; and nothing is flushed, so that after a loss of power there
    may be a name without its content. It also holds a second copy of everything in memory meanwhile.) What is loaded is
    compared with the checksums in it. The command line and the modules of this package use this by themselves; for
    other modules, pass ``Trainer(plugins=[WholeCheckpoints()])``. To places that are not in a file system, such as
    ``s3://``, Lightning writes, and from there nothing is read: of an address Lightning runs what code is in it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Place, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            TrainingError: If the disk does not take it.
        """
        if remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        # Named after the target: what a killed process leaves of it is written over by the next one.
        aside = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(target)
        except BaseException as error:  # even of an interruption nothing is left
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            failed = error_of_the_disk(error)
            if failed is None:
                raise
            raise TrainingError(
                f"Cannot write the checkpoint {target} ({failed.strerror}); those that were written before are whole: "
                "make room, or set `trainer.default_root_dir` to another folder, and go on with `--ckpt_path` of one "
                "of them."
            ) from error
        flush_names(target.parent)

    def load_checkpoint(
        self, path: Place, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, with nothing but tensors and plain data in it unless asked for otherwise.

        Raises:
            ConfigurationError: If there is none, or it is damaged, or it is an address.
        """
        refuse_address(path)
        # Not mapped: the file may be replaced while its tensors are in use.
        options = {"map_location": map_location or "cpu", "mmap": False}
        return read_checkpoint(Path(path), weights_only=weights_only is not False, **options)


def flush_names(folder: Path) -> None:
    """Make the disk know the new name of a file too, where the system allows it."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
