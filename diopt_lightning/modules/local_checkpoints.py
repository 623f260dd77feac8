"""Modules whose checkpoints are read from files alone, whatever trainer they are given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diopt_lightning.data.files import refuse_address
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint
from diopt_lightning.resuming.checkpoint_writing import WholeCheckpoints


class LocalCheckpoints(pl.LightningModule):
    """A module that reads no checkpoint from an address: what comes from there Lightning runs as code.

    Its trainer's checkpoints are :class:`~diopt_lightning.resuming.WholeCheckpoints`, unless a plugin of the user's own
    writes them.
    """

    def configure_callbacks(self) -> Sequence[pl.Callback] | pl.Callback:
        """Let the trainer's checkpoints be whole and local, before one is read."""
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeCheckpoints()
        return super().configure_callbacks()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make a module from a checkpoint, as Lightning does.

        Raises:
            ConfigurationError: If it or ``hparams_file`` is an address, or it is no file or damaged.
        """
        refuse_address(kwargs.get("hparams_file"))
        if not isinstance(checkpoint_path, str | Path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        refuse_address(checkpoint_path)
        read_checkpoint(Path(checkpoint_path), weights_only=kwargs.get("weights_only") is not False)
        with Path(checkpoint_path).open("rb") as file:  # a name that begins with `http` is an address for Lightning
            return super().load_from_checkpoint(file, *args, **kwargs)
