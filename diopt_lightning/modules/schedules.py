"""Learning rates that follow the length of the run."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.modules.parameters import of_pytorch


class LinearWithWarmup(LRScheduler):
    """A learning rate that rises linearly from 0 and then falls linearly to 0, as transformers' schedule of that name.

    In a configuration: ``inner_scheduler: {class_path: diopt_lightning.modules.LinearWithWarmup, init_args:
    {warmup_steps: 100}}``. Its length is no part of its state: a resumed run follows the one that it is given.

    Args:
        optimizer: The optimizer, whose steps are meant below.
        warmup_steps: Steps in which the learning rate rises.
        total_steps: Steps after which it has fallen to 0. Default: those of the run, which the modules of this package
            ask the trainer for.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule, rates = LinearWithWarmup(optimizer, warmup_steps=2, total_steps=4), []
        >>> for _ in range(4):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.0, 0.5, 1.0, 0.5]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None) -> None:
        require_at_least(0, of="LinearWithWarmup", warmup_steps=warmup_steps)
        require_at_least(warmup_steps + 1, of="LinearWithWarmup", hint="It rises before.", total_steps=total_steps)
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group of parameters at the present step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """The share of the optimizer's own learning rate at a step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step == 0:
            return 1.0  # before a run has said how long it is
        if self.total_steps is None:
            raise ConfigurationError("LinearWithWarmup needs its `total_steps`, which no module has set.")
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the schedule's length."""
        return {k: v for k, v in super().state_dict().items() if k not in ("warmup_steps", "total_steps")}


def made_scheduler(option: str, make: LRSchedulerCallable, optimizer: Optimizer) -> LRScheduler:
    """Make the scheduler of an option, which follows the number of an optimizer's steps.

    Raises:
        ConfigurationError: If it cannot be made, is none of this optimizer, or needs a metric.
    """
    then = "give a function that takes an optimizer and returns a scheduler, with all that it needs."
    with of_pytorch(f"`{option}` cannot be made", then):
        scheduler: Any = make(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigurationError(
            f"`{option}` is a ReduceLROnPlateau, which needs a metric at every step: choose a scheduler that follows "
            "the number of steps."
        )
    if not isinstance(scheduler, LRScheduler) or scheduler.optimizer is not optimizer:
        raise ConfigurationError(
            f"`{option}` made {type(scheduler).__name__}, which is no scheduler of the optimizer that it was given: "
            "return one, such as `torch.optim.lr_scheduler.StepLR(optimizer, 100)`."
        )
    return scheduler


def end_with_the_run(trainer: Trainer, steps: Mapping[str | None, float]) -> None:
    """Tell schedules that were not given their length how many steps their optimizers take.

    To be called when training starts: only then the number of batches is known.

    Args:
        trainer: The trainer.
        steps: Steps by the name of the schedule; negative or infinite where the trainer does not say.

    Raises:
        ConfigurationError: If the trainer does not say.
    """
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if not isinstance(schedule, LinearWithWarmup) or schedule.total_steps is not None:
            continue
        number = steps[config.name]
        if not 0 <= number < math.inf:
            raise ConfigurationError(
                "LinearWithWarmup must know how many steps the run has: set its `total_steps`, or `trainer.max_steps`."
            )
        schedule.total_steps = int(number)
        if schedule.total_steps <= schedule.warmup_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"LinearWithWarmup rises for {schedule.warmup_steps} steps (`warmup_steps`), and the run has "
                f"{schedule.total_steps} of its optimizer: the learning rate is never the one that was given."
            )


def steps_of_a_run(trainer: Trainer, accumulation: int) -> float:
    """Optimizer steps, perhaps with a fraction, of a run that takes one after each ``accumulation`` batches.

    Infinite where the trainer does not say when it ends.
    """
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = epochs * trainer.num_training_batches / accumulation
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
