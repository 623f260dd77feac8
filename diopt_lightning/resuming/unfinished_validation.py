"""Where between batches, epochs and validations a resumed run goes on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from diopt_lightning.resuming.loop_position import put_in_place


class UnfinishedValidation(Callback):
    """Lets a resumed run go on in the loops' place of its checkpoint, a validation that was due or under way included.

    Without it, Lightning takes a validation that is due for done: its metrics are missing, and with them checkpoints
    that are selected by it, and those of the end of the epoch. It also loses count of the epochs, and trains too long
    when it is interrupted twice; see :func:`~diopt_lightning.resuming.loop_position.put_in_place`.
    """

    def __init__(self) -> None:
        self._running = False
        self._saved: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the loops stood."""
        self._saved = checkpoint.get("loops", {}).get("fit_loop")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from there."""
        if trainer.fit_loop.is_resuming and self._saved is not None:
            put_in_place(trainer, self._saved)
        self._saved = None

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
            before = progress["total"]["ready"] - (progress["current"]["ready"] if self._running else 0)
            progress["total"] = dict.fromkeys(("ready", "started"), before + 1) | dict.fromkeys(
                ("processed", "completed"), before
            )
            progress["current"] = dict.fromkeys(progress["total"], 0)
            progress["is_last_batch"] = False


def validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the training batch that has just been computed."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    counts: Any = loop.batch_progress.total
    after_batch = trainer.training and counts.completed < counts.processed == counts.ready
    nothing_to_do = loop.val_loop._combined_loader is not None and loop.val_loop.skip
    return after_batch and fetcher is not None and not nothing_to_do and loop._should_check_val_fx(fetcher)
