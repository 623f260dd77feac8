"""A level of a bilevel problem: the optimizer of its parameters, and how it is driven."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.modules.gradients import clip


@dataclass
class Level:
    """What the inner and the outer level have each for themselves.

    A configuration has these as options of the module, ``inner_optimizer`` and so on, which it had before there was a
    name for what they are options of: saved configurations stay valid.

    Args:
        name: ``inner`` or ``outer``.
        make_optimizer: Makes the optimizer of its parameters.
        make_scheduler: Makes a learning rate scheduler that advances after every step of that optimizer.
        gradient_clip: Largest norm of its gradient; ``None`` for no limit.
        accumulation: Gradients that are averaged into one step.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    name: str
    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    gradient_clip: float | None
    accumulation: int

    def __post_init__(self) -> None:
        accumulation: dict[str, Any] = {f"{self.name}_accumulation": self.accumulation}
        require_at_least(1, **accumulation)
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigurationError(f"`{self.name}_gradient_clip` must be positive or null, got {self.gradient_clip}.")

    def configure(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """Make optimizer and scheduler, as Lightning's ``configure_optimizers`` returns them.

        Raises:
            ConfigurationError: If the scheduler needs a metric.
        """
        optimizer = self.make_optimizer(parameters)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigurationError(
                f"`{self.name}_scheduler` is a ReduceLROnPlateau, which needs a metric at every step: choose a "
                "scheduler that follows the number of steps."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr-{self.name}"}}

    def step(
        self,
        optimizer: Optimizer | LightningOptimizer,
        parameters: Sequence[nn.Parameter],
        norm: Tensor,
        trainer: Trainer,
    ) -> None:
        """Clip the gradients, whose norm is a finite scalar, take a step along them, and let the schedule follow.

        (Lightning counts a step of its own wrapper of an optimizer in ``trainer.global_step``, and of no other.)
        """
        clip(parameters, norm, self.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        for config in trainer.lr_scheduler_configs:
            if config.name == f"lr-{self.name}":
                config.scheduler.step()  # type: ignore[call-arg]
