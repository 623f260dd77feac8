"""Random numbers of a resumed run."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from diopt_lightning.resuming.processes import of_all_processes, of_this_process
from diopt_lightning.resuming.random_numbers import drawing_from, random_state, set_random_state


class RandomState(Callback):
    """Gives training a stream of random numbers of its own, and keeps it in checkpoints, which Lightning does not.

    Every batch goes on with the state that the one before it has left, on each process: validation, data loaders and
    whatever else stands between two batches do not change what training draws. So a resumed run, in which some of that
    happens at other times or not at all, draws the same exemplars and dropout as the run that was never interrupted.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the stream of an earlier run that did not end in a checkpoint."""
        if not trainer.ckpt_path:
            self._state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on where the last batch has ended."""
        if self._state is not None:
            set_random_state(self._state, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep where the batch has ended."""
        self._state = random_state(pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes, after the last batch; they must ask together."""
        return {"processes": of_all_processes(self._state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of this process; another number of processes goes on with random numbers of its own."""
        self._state = of_this_process(state_dict["processes"])
        if self._state is not None:
            with drawing_from(self._state, torch.device("cpu")):
                pass  # what is no state fails here, and not at the first batch
