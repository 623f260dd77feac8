"""Where Lightning's loops stand when a run goes on: where they would if it had never been stopped."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import RestartStage, _FitLoop


def put_in_place(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Set the counters of loops that were restored from a checkpoint, before their first batch.

    Lightning 2.6 takes an epoch whose last batch was done for one that is still to be done: it counts it as processed
    and completed (the fit loop's ``reset``) and then skips counting the next one as ready and started
    (``on_advance_start``), so that a checkpoint of the resumed run, from which it goes on again, tells one epoch too
    few, and the run trains too long. Under ``max_steps`` it begins an epoch anew, or takes one batch more than the
    epoch has, wherever the last run had ended. Here all follows from two facts: how many epochs had begun, and how many
    batches of the last of them were done.

    Args:
        trainer: A trainer whose fit loop is about to begin.
        saved: What its checkpoint has of the fit loop.
    """
    fit: Any = trainer.fit_loop
    loop: Any = fit.epoch_loop
    epochs, batches = saved["epoch_progress"], saved["epoch_loop.batch_progress"]
    begun, done = epochs["total"]["ready"], batches["current"]["processed"]
    if batches["current"]["ready"] != done or (begun > 0) != (done > 0):
        return  # in the middle of a step, or before the first: Lightning's business
    in_batch_end = batches["total"]["completed"] < batches["total"]["processed"]
    if in_batch_end:  # of a run that was resumed by Lightning alone
        begun = max(begun, epochs["total"]["processed"] + 1)
    epoch_had_ended = epochs["total"]["processed"] == begun
    validation: Any = loop.val_loop.batch_progress.total
    validation.ready = validation.started = validation.completed  # the one batch more by which it is begun again

    count_epochs(trainer, begun, ended=False)
    due = fit._data_fetcher is not None and loop._should_check_val_fx(fit._data_fetcher)
    last = batches["is_last_batch"] or done >= trainer.num_training_batches
    if begun == 0 or (last and (epoch_had_ended or in_batch_end or not due)):
        count_epochs(trainer, begun, ended=True)
        loop._batches_that_stepped += in_batch_end
        for counts in (loop.batch_progress.total, loop.batch_progress.current):
            counts.completed = counts.processed
        load_loaders(fit)
        fit._restarting, fit._restart_stage = False, RestartStage.NONE
        loop.restarting = False
        loop.reset_restart_stage()
        return
    loop._batches_that_stepped -= epoch_had_ended and due  # at `max_steps`, in the middle of an epoch
    if not fit.restarting:
        load_loaders(fit)
        fit.restarting = True
        loop.update_restart_stage()
    fit._restart_stage = RestartStage.RESTARTED_MID_EPOCH


def load_loaders(fit: _FitLoop) -> None:
    """Give data loaders that keep states those of the checkpoint, which Lightning does within an epoch alone."""
    if fit._combined_loader_states_to_load and fit._data_fetcher is not None:
        fit._restarting = True
        fit._load_combined_loader_states()
        iter(fit._data_fetcher)


def count_epochs(trainer: Trainer, begun: int, ended: bool) -> None:
    """Count all epochs that have begun as done, but the last one if it has not ended."""
    done = begun if ended else max(0, begun - 1)
    for counts in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
        counts.load_state_dict({"ready": begun, "started": begun, "processed": done, "completed": done})
