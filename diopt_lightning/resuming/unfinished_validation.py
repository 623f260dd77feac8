"""Validation that a resumed run has still to do."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class UnfinishedValidation(Callback):
    """Lets a resumed run begin a validation again that was due or under way when its checkpoint was written.

    Without it, Lightning takes a validation that is due for done: its metrics are missing, and with them checkpoints
    that are selected by it, and those of the end of the epoch. Weights are the same in either case.
    """

    def __init__(self) -> None:
        self._running = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the beginning."""
        self._running = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the end, before metrics select checkpoints."""
        self._running = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count as Lightning does where it is about to validate the first batch."""
        if self._running or validation_is_due(trainer):
            loops = checkpoint["loops"]["fit_loop"]
            batches = loops["epoch_loop.batch_progress"]
            for part in ("total", "current"):
                batches[part] = batches[part] | {"completed": batches[part]["processed"]}
            progress = loops["epoch_loop.val_loop.batch_progress"]
            progress["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["current"] = dict.fromkeys(progress["total"], 0)
            progress["is_last_batch"] = False


def validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the training batch that has just been computed."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    counts: Any = loop.batch_progress.total
    after_batch = trainer.training and counts.completed < counts.processed == counts.ready
    return after_batch and fetcher is not None and loop._should_check_val_fx(fetcher)
