"""The method of conjugate gradients, which knows when it must stop."""

from typing import Any

from diopt_lightning.bilevel.estimators.implicit import Solution
from diopt_lightning.bilevel.estimators.krylov import KrylovEstimator, damped
from diopt_lightning.bilevel.products.base import Linearization
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm, scale
from diopt_lightning.errors import require_at_least


class ConjugateGradient(KrylovEstimator):
    r"""Conjugate gradients (Hestenes and Stiefel 1952), with damping and a stop at negative curvature.

    For hypergradients: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; Rajeswaran et
    al., "Meta-learning with implicit gradients", NeurIPS 2019.

    It minimizes :math:`\frac{1}{2} p^\top A p - p^\top v_0` with :math:`A = H + \delta I` over the space of the
    products, which is the fastest way to the solution where :math:`A` is positive definite. Where it is not, the
    minimum does not exist: a search direction :math:`d` with :math:`d^\top A d \le 0` ends the iteration, is counted in
    the statistics, and is warned of once, with the damping that would have been needed. (Undamped and unstopped, it
    diverges on the indefinite Hessians of deep networks.) By default the damping is 1% of the largest eigenvalue, and
    at least twice the lowest one where that is negative.

    Cost: ``products``, four vectors of theta's size, two inner products of vectors each. The right one for systems that
    are convex or well damped and are to be solved accurately, with 20 products or more. With few products it may be
    worse than the right-hand side alone on a language model, as its error is smallest in another norm.

    Args:
        products: Products of a hypergradient at most. Default: 20.
        tolerance: The residual at which to stop, relative to the right-hand side. Default: 1e-6.
        options: ``damping``, ``warm_start``, ``spectrum`` and ``product`` of
            :class:`~diopt_lightning.bilevel.KrylovEstimator`. With differences in float32 as the ``product`` conjugacy
            is soon lost.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`, ``damping``, and ``stopped_early``, 1 if
    negative curvature ended the iteration.

    Raises:
        ConfigurationError: If an argument is outside of its range.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi]
        ... )
        >>> ConjugateGradient(damping=0.0)(problem).gradient
        [tensor([-3.])]
    """

    def __init__(self, products: int = 20, *, tolerance: float = 1e-6, **options: Any) -> None:
        super().__init__(products, **options)
        require_at_least(2, of="ConjugateGradient", products=products)
        require_at_least(0, tolerance=tolerance)
        self.tolerance = tolerance

    def automatic_damping(self) -> float:
        """Enough for the eigenvalues seen to be positive, and for a condition number of at most 100."""
        return max(0.01 * self.spectrum.largest, -2 * self.spectrum.lowest)

    def iterate(self, linearization: Linearization, right: Vector, products: int, damping: float) -> Solution:
        """Iterate until the products are spent, the tolerance is met, or curvature is negative."""
        solution, residual, direction = scale(right, 0.0), right, right
        squared = initial = dot(right, right).item()
        for _ in range(products - 1):
            if squared <= self.tolerance**2 * initial:
                break
            product = damped(linearization, direction, damping)
            curvature = dot(direction, product).item()
            if curvature <= 0:
                rate = curvature / dot(direction, direction).item()
                self.warn_once(
                    f"ConjugateGradient met a negative curvature of {rate:.3g} (with its damping of {damping:.3g}) and "
                    f"stopped: set `damping` to {2 * (damping - rate):.3g} or more, or use `MinRes` or `Chebyshev`, "
                    "which live with negative curvature."
                )
                if norm(solution).item() == 0:
                    # Without a single step, the right-hand side itself is the best that is known.
                    solution = scale(right, 1 / abs(rate) if rate else 1.0)
                return Solution(solution, statistics={"stopped_early": 1.0})
            length = squared / curvature
            solution = add(solution, direction, length)
            residual = add(residual, product, -length)
            before, squared = squared, dot(residual, residual).item()
            direction = add(residual, direction, squared / before)
        return Solution(solution, statistics={"stopped_early": 0.0})
