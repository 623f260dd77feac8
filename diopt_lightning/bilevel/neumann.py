"""The truncated Neumann series, the solver of the paper."""

import warnings
from typing import Any

from diopt_lightning.bilevel.hypergradient import ConvergenceWarning, HypergradientEstimator, Solution
from diopt_lightning.bilevel.products import Linearization, Product
from diopt_lightning.bilevel.spectrum import largest_eigenvalue
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm, scale
from diopt_lightning.errors import ConfigurationError

# A relative residual that is warned of. A short step along weak negative curvature ends a little above 1, harmlessly.
DIVERGED = 1.1


class Neumann(HypergradientEstimator):
    r"""Truncated Neumann series (Lorraine, Vicol and Duvenaud, AISTATS 2020; the solver of Isonuma et al. 2023).

    .. math:: H^{-1} v_0 \approx p = \gamma \sum_{m=0}^{M} (I - \gamma H)^m v_0

    It is what :math:`M + 1` steps of gradient descent on the inner loss would make of the hypergradient, costs
    :math:`M + 1` products, and converges for :math:`0 < \gamma < 2 / \lambda_{max}` where :math:`H` is positive
    definite. A larger :math:`\gamma` does not fail: it flips the sign of the answer. A deep network's Hessian also has
    negative eigenvalues, along which every further term makes the answer worse. Both show in the residual, which comes
    free with the last product: :math:`v_0 - H p = (I - \gamma H)^{M+1} v_0`. Where it is more than a tenth larger than
    :math:`v_0` itself, a :class:`~diopt_lightning.bilevel.ConvergenceWarning` says which of the two it is, and by how
    much.

    Args:
        terms: :math:`M`, the terms after the first. Default: 1, as in the paper's implementation.
        step_size: :math:`\gamma`, in units of one over the Hessian's. Default: 1 over an estimate of
            :math:`\lambda_{max}`, which converges even if the estimate is too low by nearly one half.
        power_iterations: Products spent on one estimate of :math:`\lambda_{max}`, where ``step_size`` is not given.
            Default: 8. The estimate is from below, and one that is too low by half is noticed and corrected.
        refresh_every: Hypergradients between two estimates of :math:`\lambda_{max}`. Default: 50, so that they cost
            less than one product in five.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`.

    Statistics: ``residual`` (relative), ``step_size``, ``products``, and ``largest_eigenvalue`` where it was estimated.

    Raises:
        ConfigurationError: If an argument is outside of its range.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.tensor([0.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
        >>> problem = BilevelProblem(
        ...     inner_loss=lambda: (theta - phi).square().sum() / 2,  # theta*(phi) = phi
        ...     outer_loss=lambda: (theta - 3).square().sum() / 2,
        ...     inner_parameters=[theta],
        ...     outer_parameters=[phi],
        ... )
        >>> Neumann(terms=20)(problem).gradient  # d/dphi of (phi - 3)^2 / 2, with theta = 0 in place of theta*
        [tensor([-3.])]
    """

    def __init__(
        self,
        terms: int = 1,
        step_size: float | None = None,
        power_iterations: int = 8,
        refresh_every: int = 50,
        product: Product | None = None,
    ) -> None:
        super().__init__(product)
        if terms < 0:
            raise ConfigurationError(f"`terms` must be 0 or more, got {terms}.")
        if step_size is not None and not step_size > 0:
            raise ConfigurationError(
                f"`step_size` must be positive, got {step_size}. Leave it out to have it estimated."
            )
        if power_iterations < 1 or refresh_every < 1:
            raise ConfigurationError(
                f"`power_iterations` and `refresh_every` must be 1 or more, got {power_iterations} and {refresh_every}."
            )
        self.terms = terms
        self.step_size = step_size
        self.power_iterations = power_iterations
        self.refresh_every = refresh_every
        self._largest_eigenvalue: float | None = None
        self._calls = 0
        self._warned = False

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Sum the series; see :class:`HypergradientEstimator`."""
        products = self._refresh_largest_eigenvalue(linearization, v0)
        total, step_size, more_products = self._sum(linearization, v0)
        solution = scale(total, step_size)
        curvature, mixed = linearization.both(solution)
        self._raise_largest_eigenvalue(curvature, solution, step_size)
        residual = add(v0, curvature, -1.0)
        size = norm(v0).item()
        statistics = {
            "residual": norm(residual).item() / size if size > 0 else 0.0,
            "step_size": step_size,
            "products": float(products + more_products + 1),
        }
        if self._largest_eigenvalue is not None:
            statistics["largest_eigenvalue"] = self._largest_eigenvalue
        if statistics["residual"] > DIVERGED and not self._warned:
            self._warned = True
            self._warn(linearization, residual, statistics)
        return Solution(mixed, statistics)

    def _sum(self, linearization: Linearization, v0: Vector) -> tuple[Vector, float, int]:
        """Return the sum of the series without its factor, the step size, and the number of products."""
        products = 0
        while True:
            step_size = self._current_step_size()
            term, total = v0, v0
            for _ in range(self.terms):
                curvature = linearization.hessian(term)
                products += 1
                if self._raise_largest_eigenvalue(curvature, term, step_size):
                    break  # and start again: with this step size the series would diverge
                term = add(term, curvature, -step_size)
                total = add(total, term)
            else:
                return total, step_size, products

    def _current_step_size(self) -> float:
        if self.step_size is not None:
            return self.step_size
        # Without any curvature along v0 the solution is the same for every step size, up to its scale.
        return 1.0 / self._largest_eigenvalue if self._largest_eigenvalue else 1.0

    def _refresh_largest_eigenvalue(self, linearization: Linearization, v0: Vector) -> int:
        """Estimate the largest eigenvalue if that is due; return the number of products that it took."""
        if self.step_size is not None:
            return 0
        due = self._calls % self.refresh_every == 0
        self._calls += 1
        if not due:
            return 0
        self._largest_eigenvalue = largest_eigenvalue(linearization, v0, self.power_iterations)
        return self.power_iterations

    def _raise_largest_eigenvalue(self, product: Vector, vector: Vector, step_size: float) -> bool:
        """Correct the estimate where a product shows that the step size chosen from it diverges.

        ``|H x| / |x|`` is never above the largest eigenvalue, and every product of the series gives it for free. The
        curvature of a network that learns fast changes within few steps; an estimate that has aged is noticed here.
        """
        if self.step_size is not None:
            return False
        size = norm(vector).item()
        seen = norm(product).item() / size if size > 0 else 0.0
        if seen * step_size <= 2.0:
            return False
        self._largest_eigenvalue = seen
        return True

    def _warn(self, linearization: Linearization, residual: Vector, statistics: dict[str, float]) -> None:
        """Say why the residual grew, judged by the curvature along it."""
        curvature = (dot(residual, linearization.hessian(residual)) / dot(residual, residual)).item()
        found = (
            f"The Neumann series diverges: after {self.terms + 1} terms with step size {statistics['step_size']:.3g} "
            f"the residual is {statistics['residual']:.3g} times the right-hand side"
        )
        if curvature > 0:
            advice = (
                f", along a curvature of {curvature:.3g}. A step size above 2 / {curvature:.3g} turns the "
                f"hypergradient around: set `step_size` to {1 / curvature:.3g} or less, or leave it out to have it "
                "estimated."
            )
        else:
            advice = (
                f", along a negative curvature of {curvature:.3g}: the inner problem is not at a minimum, and more "
                f"terms make it worse. Use fewer `terms` (now {self.terms}), or more inner steps before an outer one."
            )
        warnings.warn(found + advice, ConvergenceWarning, stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate of the largest eigenvalue and its age."""
        return {"largest_eigenvalue": self._largest_eigenvalue, "calls": self._calls, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._largest_eigenvalue = state["largest_eigenvalue"]
        self._calls = state["calls"]
        self._warned = state["warned"]
