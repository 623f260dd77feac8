"""Random numbers of a resumed run."""

from typing import Any

import lightning.pytorch as pl
import torch


class RandomState(pl.Callback):
    """Keeps PyTorch's random state in checkpoints, which Lightning does not.

    Without it, dropout and drawn exemplars of a resumed run differ from those of the run that was never interrupted.
    The state is restored just before the first training batch, after everything that draws numbers while a run starts.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the state of a checkpoint, once."""
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["cpu"])
        # A checkpoint may have been written on a machine with another number of GPUs.
        if len(self._restored["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(self._restored["cuda"])
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the CPU and of all GPUs."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the first batch."""
        self._restored = state_dict
