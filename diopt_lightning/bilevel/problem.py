"""The bilevel problem: two losses, two groups of parameters."""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer

from diopt_lightning.bilevel.autocast import Autocast
from diopt_lightning.bilevel.vectors import Average, identity
from diopt_lightning.errors import ConfigurationError

Loss = Callable[[], Tensor]
"""Computes a scalar at the current values of the parameters."""


@dataclass(frozen=True)
class MicroBatches:
    r"""A loss over a batch that is computed in parts, so that the graph of one part at a time is in memory.

    .. math:: L = \sum_i w_i L_i \Big/ \sum_i w_i

    Args:
        losses: :math:`L_i`, one for each part.
        weights: :math:`w_i`, for means over parts of different size the number of what each is a mean over (e.g. of
            target tokens). Default: all equal.

    Raises:
        ConfigurationError: If there is no part, or a weight is missing or not positive.
    """

    losses: Sequence[Loss]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.losses:
            raise ConfigurationError("`losses` of MicroBatches is empty: a loss needs at least one part.")
        if self.weights is not None and len(self.weights) != len(self.losses):
            raise ConfigurationError(f"MicroBatches has {len(self.losses)} losses and {len(self.weights)} weights.")
        if self.weights is not None and not all(weight > 0 for weight in self.weights):
            raise ConfigurationError(f"The weights of MicroBatches must be positive, got {list(self.weights)}.")

    def parts(self) -> list[tuple[Loss, float]]:
        """Each part's loss and its weight; the weights sum to one."""
        weights = [float(weight) for weight in self.weights or [1.0] * len(self.losses)]
        return [(loss, weight / sum(weights)) for loss, weight in zip(self.losses, weights, strict=True)]


@dataclass(frozen=True)
class BilevelProblem:
    r"""One instance of the bilevel problem, at the current values of its parameters.

    .. math:: \min_\phi L_{val}(\theta^*(\phi), \phi) \quad \text{with} \quad
              \theta^*(\phi) = \arg\min_\theta L_{train}(\theta, \phi)

    Args:
        inner_loss: Computes the scalar :math:`L_{train}(\theta, \phi)`, at once or in :class:`MicroBatches`. It may be
            called several times for one hypergradient, each time from the same random state, so that a dropout mask is
            the same in all products.
        outer_loss: Computes the scalar :math:`L_{val}(\theta, \phi)`, at once or in micro-batches.
        inner_parameters: :math:`\theta`. A tensor that is listed twice (tied weights) counts once.
        outer_parameters: :math:`\phi`.
        average: Averages a vector over processes, so that all of them solve the system of the global batch. The
            default is the identity, which is right on one process;
            :func:`~diopt_lightning.bilevel.distributed.average_over_processes` is right on several.
        inner_optimizer: The optimizer of :math:`\theta`, for estimators that differentiate its steps.
        inner_gradient_clip: The largest norm of a gradient that this optimizer is given, for the same estimators.
            Default: no limit.
        autocast: The autocast that losses are computed in, where that is not the present one: an estimator computes
            with autocast off, and lets losses have what was on when it was called.

    Raises:
        ConfigurationError: If a group is empty, a parameter does not require a gradient, or one stands in both groups.

    Example:
        >>> import torch
        >>> theta, phi = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     inner_loss=lambda: (theta - phi).square().sum(),
        ...     outer_loss=lambda: (theta - 3).square().sum(),
        ...     inner_parameters=[theta],
        ...     outer_parameters=[phi],
        ... )
        >>> len(problem.inner_parameters)
        1
    """

    inner_loss: Loss | MicroBatches
    outer_loss: Loss | MicroBatches
    inner_parameters: Sequence[Tensor]
    outer_parameters: Sequence[Tensor]
    average: Average = field(default=identity)
    inner_optimizer: Optimizer | None = None
    inner_gradient_clip: float | None = None
    autocast: Autocast | None = None

    def __post_init__(self) -> None:
        for name in ("inner_parameters", "outer_parameters"):
            parameters = list({id(tensor): tensor for tensor in getattr(self, name)}.values())
            if not parameters:
                raise ConfigurationError(
                    f"`{name}` is empty: a bilevel problem needs at least one parameter at each level."
                )
            for position, tensor in enumerate(parameters):
                if not tensor.requires_grad:
                    raise ConfigurationError(
                        f"`{name}[{position}]` of shape {tuple(tensor.shape)} does not require a gradient: "
                        "call `.requires_grad_()` on it or leave it out."
                    )
            object.__setattr__(self, name, parameters)
        outer = {id(tensor) for tensor in self.outer_parameters}
        shared = [tuple(tensor.shape) for tensor in self.inner_parameters if id(tensor) in outer]
        if shared:
            raise ConfigurationError(
                f"{len(shared)} parameter(s) of shape {shared} are both inner and outer: a parameter belongs to one "
                "level. Remove them from `inner_parameters` or from `outer_parameters`."
            )

    def inner_parts(self) -> list[tuple[Loss, float]]:
        """The parts of the inner loss and their weights, which sum to one; a single part where it is not split."""
        return parts(self.inner_loss, self.autocast)

    def outer_parts(self) -> list[tuple[Loss, float]]:
        """The parts of the outer loss and their weights, which sum to one; a single part where it is not split."""
        return parts(self.outer_loss, self.autocast)


def parts(loss: Loss | MicroBatches, autocast: Autocast | None) -> list[tuple[Loss, float]]:
    """Return the parts of a loss, each of which leaves the random state as it was, and their weights."""
    split = loss.parts() if isinstance(loss, MicroBatches) else [(loss, 1.0)]
    return [(replayed(part, autocast), weight) for part, weight in split]


def replayed(loss: Loss, autocast: Autocast | None) -> Loss:
    """Make a loss start from the same random state in every call and consume none of it."""

    def evaluate() -> Tensor:
        # This process's own GPU, if it has one: asking the others for their state would open a context on each.
        used = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = [torch.cuda.current_device()] if used else []
        casting = nullcontext() if autocast is None else autocast.again()
        others = random.getstate(), numpy.random.get_state()  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad(), casting:
                return loss()
        finally:
            random.setstate(others[0])
            numpy.random.set_state(others[1])  # noqa: NPY002

    return evaluate


def scalar(loss: Tensor, name: str) -> Tensor:
    """Return ``loss`` as a zero-dimensional tensor.

    Raises:
        ConfigurationError: If it is no tensor of one real element.
    """
    if not isinstance(loss, Tensor):
        raise ConfigurationError(f"`{name}` returned {type(loss).__name__}, expected a scalar tensor.")
    if loss.numel() != 1:
        raise ConfigurationError(
            f"`{name}` returned a tensor of shape {tuple(loss.shape)}: reduce it to a scalar (mean or sum)."
        )
    if loss.is_complex():
        raise ConfigurationError(
            f"`{name}` returned {loss.dtype}: return a real number, such as its `.real` or `.abs()`."
        )
    return loss.reshape(())


def differentiable(loss: Tensor, name: str) -> Tensor:
    """Return ``loss`` if it has a graph to differentiate.

    Raises:
        ConfigurationError: If it has none.
    """
    if not loss.requires_grad:
        raise ConfigurationError(
            f"`{name}` returned a tensor without a gradient graph: it was computed under `no_grad` or "
            "`inference_mode`, was detached, or depends on no parameter."
        )
    return loss
