"""A bilevel problem as a Lightning module: two levels, each with a loss, parameters and an optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from diopt_lightning.bilevel import BilevelProblem, Hypergradient, HypergradientEstimator
from diopt_lightning.bilevel.sharding import any_sharded
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.modules.gradients import check_clip, clip, evaluation_mode
from diopt_lightning.modules.micro_batches import MicroBatched
from diopt_lightning.modules.parameter_groups import ParameterGroup, check_options, freeze, grouped
from diopt_lightning.modules.parameters import (
    check_held,
    check_levels,
    check_optimizer,
    check_parameters,
    made_optimizer,
    of_pytorch,
)
from diopt_lightning.modules.schedules import end_with_the_run, made_scheduler, steps_of_a_run
from diopt_lightning.modules.strategies import (
    OF_TWO_LEVELS,
    check_strategy,
    refuse_callbacks,
    refuse_loss_scaling,
    refuse_trainers_own,
)


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
        groups: Parameters that the optimizer treats by options of their own.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    name: str
    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    gradient_clip: float | None
    accumulation: int
    groups: Sequence[ParameterGroup] = ()

    def __post_init__(self) -> None:
        accumulation: dict[str, Any] = {f"{self.name}_accumulation": self.accumulation}
        require_at_least(1, **accumulation)
        if not callable(self.make_optimizer):
            raise ConfigurationError(
                f"`{self.name}_optimizer` is {type(self.make_optimizer).__name__}, and must be a function that makes "
                "one: `lambda parameters: torch.optim.SGD(parameters, lr=0.1)`."
            )
        check_clip(self.name, self.gradient_clip)

    def freeze(self, parameters: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> None:
        """Take the gradient from parameters that are not to be learned."""
        freeze(self.groups, {names[parameter]: parameter for parameter in parameters})

    def configure(self, parameters: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """Make optimizer and scheduler, as Lightning's ``configure_optimizers`` returns them.

        Raises:
            ConfigurationError: If the optimizer is of no use here, a group does not fit, or the scheduler needs a
                metric.
        """
        named = {names.get(parameter, str(index)): parameter for index, parameter in enumerate(parameters)}
        option = f"{self.name}_groups"
        given = grouped(self.groups, (named, {}), option=option) if self.groups else parameters
        optimizer = made_optimizer(f"{self.name}_optimizer", self.make_optimizer, given)
        check_optimizer(self.name, optimizer, parameters)
        check_options(optimizer, self.groups, option)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = made_scheduler(f"{self.name}_scheduler", self.make_scheduler, optimizer)
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

        Raises:
            ConfigurationError: If the optimizer lacks a parameter, or it or the schedule cannot go on.
        """
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        check_held(self.name, plain, parameters)
        clip(parameters, norm, self.gradient_clip)
        then = "choose another one, or other options (a checkpoint has those of its own optimizer)."
        what = f"`{self.name}_optimizer` or `{self.name}_scheduler` cannot take a step with {type(plain).__name__}"
        with of_pytorch(what, then):
            optimizer.step()
            optimizer.zero_grad()
            for config in trainer.lr_scheduler_configs:
                if config.name == f"lr-{self.name}":
                    config.scheduler.step()  # type: ignore[call-arg]


class TwoLevels(MicroBatched, ABC):
    """Two losses and two groups of parameters, each with its optimizer: what is optimized, and not yet in which order.

    A subclass sets the attributes of :class:`BilevelModule` that are used here.
    """

    hypergradient: HypergradientEstimator
    inner_level: Level
    outer_level: Level
    inner_steps: int
    outer_batches: int

    @abstractmethod
    def inner_loss(self, batch: Any) -> Tensor:
        r"""Return :math:`L_{train}(\theta, \phi)` of a batch of the inner loader, a scalar."""

    @abstractmethod
    def outer_loss(self, batch: Any) -> Tensor:
        r"""Return :math:`L_{val}(\theta, \phi)` of a batch of the outer loader, a scalar."""

    @abstractmethod
    def outer_parameters(self) -> Sequence[nn.Parameter]:
        r"""Return :math:`\phi`."""

    def inner_parameters(self) -> Sequence[nn.Parameter]:
        r"""Return :math:`\theta`. Default: all parameters that require a gradient and are not outer."""
        outer = {id(parameter) for parameter in self.outer_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in outer]

    def estimate_hypergradient(self, inner_batch: Any, outer_batch: Any) -> Hypergradient:
        """Estimate the hypergradient at the current parameters, with dropout off.

        Dropout that is drawn anew in every product would be a different system in each of them. Of all evaluations the
        first one of the outer loss alone may log, and change metrics and buffers.
        """
        with evaluation_mode(self):
            return self.hypergradient(self.problem([inner_batch], outer_batch, noticed=True))

    def problem(self, inner_batches: Sequence[Any], outer_batch: Any, noticed: bool = False) -> BilevelProblem:
        """Return the bilevel problem of these batches at the current parameters, for the engine.

        What its losses log, and change in metrics and buffers, is dropped, but for the first evaluation of the outer
        loss if that is to be ``noticed``.
        """
        attached = self._trainer is not None or self._fabric is not None
        outer_batches = [outer_batch] if self.outer_batches == 1 else list(outer_batch)
        return BilevelProblem(
            inner_loss=self.mean_loss(self.inner_loss, inner_batches),
            outer_loss=self.mean_loss(self.outer_loss, outer_batches, noticed),
            inner_parameters=self.inner_parameters(),
            outer_parameters=self.outer_parameters(),
            average=self._average,
            inner_optimizer=self.optimizers(use_pl_optimizer=False)[0] if attached else None,  # type: ignore[index]
            inner_gradient_clip=self.inner_level.gradient_clip,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make both optimizers and their schedulers; the inner level comes first.

        Raises:
            ConfigurationError: If the trainer's strategy or precision cannot carry the estimator, parameters or an
                optimizer of a level cannot be trained or train, or a scheduler needs a metric.
        """
        if self._trainer is not None:
            # Before an optimizer meets a strategy that fails with it, and names no way out.
            check_strategy(self.trainer, self.hypergradient)
            refuse_loss_scaling(self.trainer)
        names = {parameter: name for name, parameter in self.named_parameters()}
        phi = check_parameters("outer", self.outer_parameters, self)
        theta = check_parameters("inner", self.inner_parameters, self)
        check_levels(theta, phi, self)
        inner = self.inner_level.configure(theta, names)
        return inner, self.outer_level.configure(phi, names)  # type: ignore[return-value]

    def on_fit_start(self) -> None:
        """Refuse what cannot work, and let all processes start from the same outer parameters.

        Raises:
            ConfigurationError: If outer parameters are sharded.
        """
        if any_sharded(self.outer_parameters()):
            raise ConfigurationError(
                "Outer parameters are sharded: call `fully_shard` on the modules of the inner level alone."
            )
        for parameter in self.outer_parameters():
            # By way of the CPU: a broadcast tensor arrives on the device that it was sent from.
            parameter.data.copy_(self.trainer.strategy.broadcast(parameter.data.cpu()))

    def on_train_start(self) -> None:
        """Let schedules end with the run."""
        inner = steps_of_a_run(self.trainer, self.inner_level.accumulation)
        end_with_the_run(self.trainer, {"lr-inner": inner, "lr-outer": inner / self.inner_steps})

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Refuse what the trainer has for one level before Lightning does, which gives advice that does not fit.

        Raises:
            ConfigurationError: If the trainer has one.
        """
        refuse_trainers_own(self.trainer)
        refuse_callbacks(self.trainer, OF_TWO_LEVELS)
        return super().configure_callbacks()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Keep the outer parameters out of DDP's reducer, which otherwise waits for their gradients in inner steps.

        ``DistributedDataParallel`` reads this attribute of the module that it wraps.
        """
        outer = {id(parameter) for parameter in self.outer_parameters()}
        names = [name for name, parameter in self.named_parameters(remove_duplicate=False) if id(parameter) in outer]
        # One of DDP's two look-ups joins a module's name and the parameter's by a dot; the module itself has no name.
        return [*names, *(f".{name}" for name in names)]
