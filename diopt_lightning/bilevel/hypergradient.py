"""What an estimator of hypergradients is, and what it returns."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products import DoubleBackward, Linearization, Product, scalar
from diopt_lightning.bilevel.vectors import Vector, add, as_vector, norm


class ConvergenceWarning(UserWarning):
    """The solver behind a hypergradient does not converge; the message says what to set instead."""


@dataclass(frozen=True)
class Hypergradient:
    r"""An estimate of :math:`dL_{val}(\theta^*(\phi), \phi) / d\phi`.

    Args:
        gradient: One tensor for each outer parameter, in its shape and in float32 at least.
        outer_loss: The value of the outer loss, a detached scalar.
        inner_loss: The value of the inner loss, a detached scalar.
        statistics: What the solver can say about itself, e.g. ``residual``, the relative residual
            :math:`\|v_0 - H p\| / \|v_0\|` of its solution :math:`p`. Near 0 the hypergradient is that of the converged
            inner problem; above 1 it is further from it than no answer at all.
    """

    gradient: list[Tensor]
    outer_loss: Tensor
    inner_loss: Tensor
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Solution:
    r"""What a solver found for :math:`H p = v_0`.

    Args:
        mixed: :math:`J^\top p`, one tensor for each outer parameter.
        statistics: As in :class:`Hypergradient`.
    """

    mixed: Vector
    statistics: dict[str, float]


class HypergradientEstimator(ABC):
    r"""Implicit differentiation of the inner problem: subclasses say how the linear system is solved.

    At an inner optimum the implicit function theorem gives, with :math:`v_0 = \partial L_{val} / \partial\theta`,

    .. math:: \frac{dL_{val}}{d\phi} = \frac{\partial L_{val}}{\partial\phi} - J^\top H^{-1} v_0 .

    (Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020.)
    The direct term is zero where the outer loss does not use :math:`\phi`, as in the paper's problem.

    Nothing is left behind in the parameters: ``.grad`` is neither read nor written, and no random state is consumed.

    Args:
        product: How to get products with second derivatives. Default: :class:`DoubleBackward`, which is exact.
    """

    def __init__(self, product: Product | None = None) -> None:
        self.product = product if product is not None else DoubleBackward()

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        """Estimate the hypergradient of ``problem`` at the current values of its parameters.

        Raises:
            ValueError: If a loss is no scalar or does not depend on the parameters that it should depend on.
            FloatingPointError: If a gradient or the solution is not finite; the message names the place.
        """
        # The outer loss goes first: its graph is freed before the larger one of the inner gradient is built.
        outer_loss, v0, direct = outer_gradients(problem)
        with self.product.linearize(problem) as linearization:
            solution = self.solve(linearization, v0)
        gradient = add(direct, solution.mixed, -1.0)
        check_finite(gradient, f"the solution of {type(self).__name__}, with the statistics {solution.statistics}")
        return Hypergradient(gradient, outer_loss, linearization.inner_loss, solution.statistics)

    @abstractmethod
    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Solve ``H p = v0`` approximately and return ``J^T p``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly as before (plain numbers and tensors)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got that of another: {sorted(state)}.")


def outer_gradients(problem: BilevelProblem) -> tuple[Tensor, Vector, Vector]:
    r"""Return the outer loss, :math:`v_0 = \partial L_{val}/\partial\theta` and :math:`\partial L_{val}/\partial\phi`.

    Raises:
        ValueError: If the outer loss is no scalar or depends on none of the inner parameters.
        FloatingPointError: If one of them is not finite.
    """
    inner, outer = list(problem.inner_parameters), list(problem.outer_parameters)
    with torch.enable_grad():
        loss = scalar(problem.outer_loss(), "outer_loss")
        gradients = torch.autograd.grad(loss, [*inner, *outer], allow_unused=True)
    if all(gradient is None for gradient in gradients[: len(inner)]):
        raise ValueError(
            "`outer_loss` depends on none of the `inner_parameters`: nothing links it to the inner problem, "
            "and its gradient needs no bilevel optimization."
        )
    vector = problem.average(as_vector(gradients, [*inner, *outer]))
    check_finite(vector, "the gradient of the outer loss")
    return loss.detach(), vector[: len(inner)], vector[len(inner) :]


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
