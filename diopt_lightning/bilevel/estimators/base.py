"""What an estimator of hypergradients is, and what it returns."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from diopt_lightning.bilevel.autocast import Autocast
from diopt_lightning.bilevel.problem import BilevelProblem, Loss, MicroBatches, differentiable, scalar
from diopt_lightning.bilevel.products.base import OF_PYTORCH, checkpointing_explained, differentiate, explained, zeros
from diopt_lightning.bilevel.vectors import Vector, add, as_vector, norm, scale
from diopt_lightning.bilevel.warning import ConvergenceWarning
from diopt_lightning.errors import ConfigurationError

Estimate = Callable[["HypergradientEstimator", BilevelProblem], "Hypergradient"]


@dataclass(frozen=True)
class Hypergradient:
    r"""An estimate of :math:`dL_{val}(\theta^*(\phi), \phi) / d\phi`.

    Args:
        gradient: One tensor for each outer parameter, in its shape and in float32 at least.
        outer_loss: The value of the outer loss, a detached scalar.
        inner_loss: The value of the inner loss, a detached scalar.
        statistics: What the estimator can say about itself, by name: ``products`` that it used and ``seconds`` that it
            took; of an :class:`~diopt_lightning.bilevel.ImplicitEstimator` also the ``residual`` of its system and the
            curvature that it met.
    """

    gradient: list[Tensor]
    outer_loss: Tensor
    inner_loss: Tensor
    statistics: dict[str, float] = field(default_factory=dict)


class HypergradientEstimator(ABC):
    r"""Estimates :math:`dL_{val}(\theta^*(\phi), \phi) / d\phi` of a :class:`~diopt_lightning.bilevel.BilevelProblem`.

    The direct term :math:`\partial L_{val} / \partial\phi` is included. An outer parameter that no loss reaches gets
    zeros. Nothing is left behind in the parameters: ``.grad`` is not written, values return to the same bits, and no
    random state is consumed.

    Attributes:
        supports_sharding: Whether inner parameters may be sharded over processes by ``fully_shard`` (FSDP2), under
            which a model has first derivatives alone; ``differentiate`` of ``bilevel/products/base.py`` takes them.
        recorded_steps: How many of the last inner steps it keeps on record, to differentiate through them; they are not
            part of its state.
    """

    supports_sharding: bool = False
    recorded_steps: int = 0
    _warned = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Let every estimator compute without autocast, in which losses alone are, and explain what PyTorch says."""
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = prepared(cls.__call__)  # type: ignore[assignment, method-assign]

    @abstractmethod
    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        """Estimate the hypergradient of ``problem`` at the current values of its parameters.

        Raises:
            ConfigurationError: If a loss is no scalar or does not depend on what it should depend on, the model cannot
                be differentiated as asked, or something is missing.
            FloatingPointError: If a value is not finite; the message names the place.
        """

    def observe(self, problem: BilevelProblem) -> None:  # noqa: B027  (nothing to do is the rule)
        """Look at an inner step that is about to be taken; most estimators need not.

        Called after the backward pass of every inner step and before the gradient is clipped and the inner optimizer
        steps, so ``.grad`` of the inner parameters holds the gradient of ``problem.inner_loss``.
        :class:`~diopt_lightning.modules.BilevelModule` does so by itself; a loop of one's own calls this.
        """

    def reset(self) -> None:
        """Forget all that earlier hypergradients and steps left: another run begins. Extend it by what is kept."""
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly as before (plain numbers and tensors)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            raise ConfigurationError(f"{type(self).__name__} has no state, got that of another: {sorted(state)}.")

    def recorded_state(self, number: int) -> list[dict[str, Any]]:
        """Return what is on record of the last ``number`` inner steps, without their losses (numbers and tensors).

        Not part of :meth:`state_dict`, because it is large, and of no use once as many steps have followed.
        """
        return []

    def restore_recorded(self, states: Sequence[dict[str, Any]], losses: Sequence[Loss | MicroBatches]) -> None:
        """Put steps on record, and no others, from what :meth:`recorded_state` returned and their inner losses."""
        if states:
            raise ConfigurationError(f"{type(self).__name__} remembers no steps, got those of another.")

    def warn_once(self, message: str) -> None:
        """Warn that a hypergradient should not be trusted; nothing after the first time."""
        if not self._warned:
            self._warned = True
            warnings.warn(message, ConvergenceWarning, stacklevel=4)


def prepared(estimate: Estimate) -> Estimate:
    """Turn autocast off for an estimate, on again where it evaluates a loss, and explain missing second derivatives."""

    @wraps(estimate)
    def call(self: HypergradientEstimator, problem: BilevelProblem) -> Hypergradient:
        autocast = Autocast([*problem.inner_parameters, *problem.outer_parameters])
        with autocast.off(), explained(type(self).__name__, only=OF_PYTORCH):
            return estimate(self, problem if problem.autocast is not None else replace(problem, autocast=autocast))

    return call


def mean_hypergradient(estimates: Sequence[Hypergradient]) -> Hypergradient:
    """The mean of several estimates; of a statistic, over those that have it."""
    gradient = estimates[0].gradient
    for estimate in estimates[1:]:
        gradient = add(gradient, estimate.gradient)
    statistics = {}
    for name in sorted(set[str]().union(*(estimate.statistics for estimate in estimates))):
        values = [estimate.statistics[name] for estimate in estimates if name in estimate.statistics]
        statistics[name] = sum(values) / len(values)
    return Hypergradient(
        scale(gradient, 1 / len(estimates)),
        torch.stack([estimate.outer_loss for estimate in estimates]).mean(),
        torch.stack([estimate.inner_loss for estimate in estimates]).mean(),
        statistics,
    )


def outer_gradients(problem: BilevelProblem) -> tuple[Tensor, Vector, Vector]:
    r"""Return the outer loss, :math:`v_0 = \partial L_{val}/\partial\theta` and :math:`\partial L_{val}/\partial\phi`.

    Raises:
        ConfigurationError: If the outer loss is no scalar or depends on none of the inner parameters.
        FloatingPointError: If one of them is not finite.
    """
    return gradients(problem, problem.outer_parts(), "outer_loss")


def inner_gradients(problem: BilevelProblem) -> tuple[Tensor, Vector, Vector]:
    r"""Return the inner loss, :math:`\partial L_{train}/\partial\theta` and :math:`\partial L_{train}/\partial\phi`.

    Raises:
        ConfigurationError: If the inner loss is no scalar or depends on none of the inner parameters.
        FloatingPointError: If one of them is not finite.
    """
    return gradients(problem, problem.inner_parts(), "inner_loss")


def gradients(problem: BilevelProblem, parts: Sequence[tuple[Loss, float]], name: str) -> tuple[Tensor, Vector, Vector]:
    """Return a loss and its gradients with respect to inner and outer parameters, over parts and processes."""
    inner, outer = list(problem.inner_parameters), list(problem.outer_parameters)
    total, value, reached = zeros([*inner, *outer]), torch.zeros((), device=inner[0].device), False
    for part, weight in parts:
        loss = differentiable(scalar(part(), name), name)
        with checkpointing_explained():
            found = differentiate(loss, problem)
        reached = reached or any(gradient is not None for gradient in found[: len(inner)])
        total = add(total, as_vector(found, [*inner, *outer]), weight)
        value = value + weight * loss.detach()
    if not reached:
        raise ConfigurationError(
            f"`{name}` depends on none of the `inner_parameters`: without that link a hypergradient is zero or needs "
            "no bilevel optimization."
        )
    vector = problem.average(total)
    check_finite(vector, f"the gradient of the {name.replace('_', ' ')}")
    return value, vector[: len(inner)], vector[len(inner) :]


def check_finite(vector: Vector, place: str) -> None:
    """Raise where a vector holds NaN or infinity: a hypergradient is never silently repaired.

    Raises:
        FloatingPointError: With the place, if any entry is not finite.
    """
    size = norm(vector).item()
    if not math.isfinite(size):
        raise FloatingPointError(
            f"A hypergradient is not finite (norm {size}); it arose in {place}. Lower the learning rates or the "
            "solver's step size, and look at the batch that was used last."
        )
