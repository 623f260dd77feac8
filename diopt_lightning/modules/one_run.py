"""What a bilevel module counts, keeps and says in one run of training."""

from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler

from diopt_lightning.modules.idle import IdleParameters, say_if_too_short, say_that_none_was_taken
from diopt_lightning.modules.levels import TwoLevels
from diopt_lightning.modules.parameters import once
from diopt_lightning.modules.skipping import OuterNorms, SkippedSteps
from diopt_lightning.modules.unfinished_round import UnfinishedRound


class OneRun(TwoLevels):
    """Two levels and the state of one run: a second ``fit`` of a module begins anew, with the weights that it has.

    A subclass sets the attributes of :class:`BilevelModule` that are used here.
    """

    inner_steps: int
    skip_limit: int
    inner_batches_seen: int
    inner_steps_taken: int
    outer_steps_taken: int

    def _begin_run(self) -> None:
        """Forget the run before: what is counted, kept and estimated is of one run. Parameters stay as they are."""
        self.inner_batches_seen = 0
        self.inner_steps_taken = 0
        self.outer_steps_taken = 0
        inner, outer = self.inner_level.accumulation, self.outer_level.accumulation
        self._round = UnfinishedRound(self.inner_steps, inner, outer, self.hypergradient.recorded_steps)
        self._skipped = SkippedSteps(self.skip_limit)
        self._outer_norms = OuterNorms()
        self._idle = IdleParameters("inner"), IdleParameters("outer")
        self.hypergradient.reset()
        self.zero_grad()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Begin a run, unless a checkpoint has, and make both optimizers; see :class:`TwoLevels`."""
        optimizers = super().configure_optimizers()
        trainer = self._trainer
        if trainer is not None and (trainer.strategy.restore_checkpoint_after_setup or not trainer.ckpt_path):
            goes_on = 0 < self.inner_steps_taken == trainer.global_step
            outer_steps = self.outer_steps_taken if goes_on else 0
            self._begin_run()
            # Not zero where the same trainer is told to fit again, which goes on with its own run.
            self.inner_steps_taken, self.outer_steps_taken = trainer.global_step, outer_steps
        return optimizers

    def on_train_start(self) -> None:
        """Let schedules end with the run, and warn of one that is too short for an outer step."""
        super().on_train_start()
        if not self.trainer.fast_dev_run and not self.outer_steps_taken:  # type: ignore[attr-defined]
            say_if_too_short(self.trainer, self.inner_steps, self.inner_level.accumulation)

    def on_train_end(self) -> None:
        """Warn of a run that took no outer step, and of parameters that it left as they were."""
        if not self.outer_steps_taken:
            say_that_none_was_taken(self._skipped.total["outer"])
        levels = self.inner_parameters(), self.outer_parameters()
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        for idle, parameters, optimizer in zip(self._idle, levels, optimizers, strict=True):
            idle.say(once(parameters), optimizer)

    def on_outer_step_end(self) -> None:
        """Called after every step of the outer optimizer; override it for what follows the outer parameters."""

    def on_validation_model_zero_grad(self) -> None:
        """Free gradients before validation, unless they are those of the batches of an unfinished inner step."""
        if self.inner_batches_seen % self.inner_level.accumulation == 0:
            super().on_validation_model_zero_grad()

    @property
    def _trial_ends(self) -> bool:
        """Whether this is the last batch of a ``fast_dev_run``, which tries an outer step whatever a round is."""
        return bool(self.trainer.fast_dev_run) and self.trainer.is_last_batch  # type: ignore[attr-defined]
