"""The method of conjugate gradients, which knows when it must stop."""

import warnings

from diopt_lightning.bilevel.estimators.krylov import KrylovEstimator, damped
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm, scale
from diopt_lightning.bilevel.warning import ConvergenceWarning
from diopt_lightning.errors import ConfigurationError


class ConjugateGradient(KrylovEstimator):
    r"""Conjugate gradients (Hestenes and Stiefel 1952), with damping and a stop at negative curvature.

    For hypergradients: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; Rajeswaran et
    al., "Meta-learning with implicit gradients", NeurIPS 2019.

    It minimizes :math:`\frac{1}{2} p^\top A p - p^\top v_0` with :math:`A = H + \delta I` over the space of the
    products, which is the fastest way to the solution where :math:`A` is positive definite. Where it is not, the
    minimum does not exist: a search direction :math:`d` with :math:`d^\top A d \le 0` ends the iteration, is counted in
    the statistics, and is warned of once, with the damping that would have been needed. (Undamped and unstopped, it
    diverges on the indefinite Hessians of deep networks.)

    Cost: ``products``, four vectors of theta's size, two inner products of vectors each. The right one for systems that
    are convex or well damped and are to be solved accurately, with 20 products or more. With few products it may be
    worse than the right-hand side alone on a language model, as its error is smallest in another norm.

    Args:
        products: Products of a hypergradient at most. Default: 20.
        damping: What is added to every eigenvalue of the Hessian. Default: 1% of the largest one, and at least twice
            the lowest one where that is negative.
        tolerance: The residual at which to stop, relative to the right-hand side. Default: 1e-6.
        warm_start: Whether to start from the last solution, which costs one of the products.
        spectrum: How the spectrum is estimated, where ``damping`` is not given. Default:
            :class:`~diopt_lightning.bilevel.Spectrum` with 8 products every 50 hypergradients.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`. With differences in float32 conjugacy is soon lost.

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

    def __init__(
        self,
        products: int = 20,
        damping: float | None = None,
        tolerance: float = 1e-6,
        warm_start: bool = False,
        spectrum: Spectrum | None = None,
        product: Product | None = None,
    ) -> None:
        super().__init__(products, damping, warm_start, spectrum, product)
        if products < 2:
            raise ConfigurationError(f"`products` of ConjugateGradient must be 2 or more, got {products}.")
        if not tolerance >= 0:
            raise ConfigurationError(f"`tolerance` must be 0 or more, got {tolerance}.")
        self.tolerance = tolerance
        self._stopped = False

    def automatic_damping(self) -> float:
        """Enough for the eigenvalues seen to be positive, and for a condition number of at most 100."""
        return max(0.01 * self.spectrum.largest, -2 * self.spectrum.lowest)

    def iterate(self, linearization: Linearization, right: Vector, products: int, damping: float) -> Vector:
        """Iterate until the products are spent, the tolerance is met, or curvature is negative."""
        self._stopped = False
        solution, residual, direction = scale(right, 0.0), right, right
        squared = initial = dot(right, right).item()
        for _ in range(products - 1):
            if squared <= self.tolerance**2 * initial:
                break
            product = damped(linearization, direction, damping)
            curvature = dot(direction, product).item()
            if curvature <= 0:
                rate = curvature / dot(direction, direction).item()
                self._stop(rate)
                # Without a single step, the right-hand side itself is the best that is known.
                return solution if norm(solution).item() > 0 else scale(right, 1 / abs(rate) if rate else 1.0)
            length = squared / curvature
            solution = add(solution, direction, length)
            residual = add(residual, product, -length)
            before, squared = squared, dot(residual, residual).item()
            direction = add(residual, direction, squared / before)
        return solution

    def _stop(self, curvature: float) -> None:
        self._stopped = True
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"ConjugateGradient met a negative curvature of {curvature:.3g} (with its damping of {self._damping:.3g}) "
            f"and stopped: set `damping` to {2 * (self._damping - curvature):.3g} or more, or use `MinRes` or "
            "`Chebyshev`, which live with negative curvature.",
            ConvergenceWarning,
            stacklevel=6,
        )

    def solver_statistics(self) -> dict[str, float]:
        """Whether negative curvature ended the iteration, and the rest; see :class:`KrylovEstimator`."""
        return super().solver_statistics() | {"stopped_early": float(self._stopped)}
