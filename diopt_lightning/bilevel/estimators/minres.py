"""The minimal residual method, for systems that are symmetric and not positive."""

from typing import Any

from diopt_lightning.bilevel.estimators.implicit import Solution
from diopt_lightning.bilevel.estimators.krylov import KrylovEstimator, damped
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.products.base import Linearization
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm, scale
from diopt_lightning.errors import require_at_least


class MinRes(KrylovEstimator):
    r"""The minimal residual method (Paige and Saunders, SIAM J. Numer. Anal. 1975).

    .. math:: p = \arg\min_{x \in \mathrm{span}(v_0, A v_0, \dots, A^{M-2} v_0)} \| v_0 - A x \|

    with :math:`A = H + \delta I`. The residual never grows, whatever the signs of the eigenvalues are, so there is no
    step size, no damping to choose and nothing that can diverge. Along negative eigenvalues it finds the stationary
    point that the equation asks for, which is a maximum there.

    Cost: ``products``, seven vectors of theta's size, two inner products of vectors each. The right one for indefinite
    systems, with 20 products or more.

    Args:
        products: Products of a hypergradient at most. Default: 20.
        damping: What is added to every eigenvalue of the Hessian. Default: 0.
        tolerance: The residual at which to stop, relative to the right-hand side. Default: 1e-6.
        options: ``warm_start`` and ``product`` of :class:`~diopt_lightning.bilevel.KrylovEstimator`.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`.

    Raises:
        ConfigurationError: If an argument is outside of its range.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi]
        ... )
        >>> MinRes()(problem).gradient
        [tensor([-3.])]
    """

    def __init__(self, products: int = 20, damping: float = 0.0, tolerance: float = 1e-6, **options: Any) -> None:
        super().__init__(products, damping, spectrum=Spectrum(), **options)
        require_at_least(2, of="MinRes", products=products)
        require_at_least(0, tolerance=tolerance)
        self.tolerance = tolerance

    def iterate(self, linearization: Linearization, right: Vector, products: int, damping: float) -> Solution:
        """Reduce the tridiagonal matrix of the Lanczos iteration by one rotation for each product."""
        size = norm(right).item()
        solution = scale(right, 0.0)
        if size == 0:
            return Solution(solution)
        left = initial = size  # the norm of the residual
        previous, vector, beta = solution, scale(right, 1 / size), 0.0
        direction_before, direction = solution, solution
        (cosine_before, sine_before), (cosine, sine) = (1.0, 0.0), (1.0, 0.0)
        for _ in range(products - 1):
            image = damped(linearization, vector, damping)
            alpha = dot(vector, image).item()
            image = add(add(image, vector, -alpha), previous, -beta)
            beta_next = norm(image).item()
            # The new column of the tridiagonal matrix, (beta, alpha, beta_next), turned by the last two rotations.
            diagonal = cosine * alpha - cosine_before * sine * beta
            above = sine * alpha + cosine_before * cosine * beta
            twice_above = sine_before * beta
            radius = (diagonal**2 + beta_next**2) ** 0.5
            if radius == 0:  # the system is singular on this space, which is exhausted
                break
            following = add(add(vector, direction_before, -twice_above), direction, -above)
            direction_before, direction = direction, scale(following, 1 / radius)
            (cosine_before, sine_before), (cosine, sine) = (cosine, sine), (diagonal / radius, beta_next / radius)
            solution = add(solution, direction, cosine * left)
            left *= -sine
            if abs(left) <= self.tolerance * initial or beta_next == 0:
                break
            previous, vector, beta = vector, scale(image, 1 / beta_next), beta_next
        return Solution(solution)
