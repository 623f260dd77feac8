"""The largest eigenvalue of the inner Hessian, from which solvers take their step size."""

from diopt_lightning.bilevel.products import Linearization
from diopt_lightning.bilevel.vectors import Vector, norm, scale


def largest_eigenvalue(linearization: Linearization, start: Vector, products: int) -> float:
    r"""Estimate :math:`\max_i |\lambda_i(H)|` by power iteration.

    Power iteration is started at the right-hand side of the system rather than at a random vector: no random state is
    consumed, and the only eigenvectors it cannot see are those that a solver working on this right-hand side cannot see
    either. The norms :math:`\|H x_k\|` of unit vectors grow monotonically towards the value from below.

    Args:
        linearization: The inner problem's second derivatives.
        start: A vector that is not zero, in the shapes of the inner parameters.
        products: The number of Hessian products to spend.

    Returns:
        The estimate, never larger than the true value; 0 where ``start`` is in the kernel of the Hessian.
    """
    estimate, vector = 0.0, start
    for _ in range(products):
        size = norm(vector).item()
        if size == 0.0:
            break
        vector = linearization.hessian(scale(vector, 1.0 / size))
        estimate = norm(vector).item()
    return estimate
