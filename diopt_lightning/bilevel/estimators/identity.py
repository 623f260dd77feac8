"""One step: the identity in place of the inverse Hessian."""

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.vectors import Vector, scale
from diopt_lightning.errors import ConfigurationError


class Identity(ImplicitEstimator):
    r"""The identity in place of the inverse Hessian.

    .. math:: p = \gamma v_0

    (Luketina et al., "Scalable gradient-based tuning of continuous regularization hyperparameters", ICML 2016.) With
    the inner learning rate for :math:`\gamma` it is the hypergradient of one step of gradient descent, as in DARTS.

    Cost: one product, no further vector. The right one as the cheapest that has the mixed derivative right, where the
    direction is what matters: an outer Adam, or a clipped norm, takes the scale away. Even then it is far off where the
    Hessian's eigenvalues differ by orders of magnitude; the ``residual`` says how far.

    Args:
        step_size: What the outer gradient is multiplied by. Default: 1.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`;
            :class:`~diopt_lightning.bilevel.FiniteDifference` needs two gradients and first-order memory.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`; the residual is that of the best
    :math:`\gamma`, so it measures the direction alone.

    Raises:
        ConfigurationError: If ``step_size`` is not positive.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi]
        ... )
        >>> Identity()(problem).gradient
        [tensor([-3.])]
    """

    scale_free = True

    def __init__(self, step_size: float = 1.0, product: Product | None = None) -> None:
        super().__init__(product)
        if not step_size > 0:
            raise ConfigurationError(f"`step_size` must be positive, got {step_size}.")
        self.step_size = step_size

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Return a multiple of ``v0``; see :class:`ImplicitEstimator`."""
        return Solution(scale(v0, self.step_size))
