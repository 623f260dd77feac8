"""One step with the inner optimizer's own preconditioner, from first derivatives."""

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.estimators.inner_step import InnerStep
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.products.finite_difference import FiniteDifference
from diopt_lightning.bilevel.vectors import Vector, scale


class SAMA(ImplicitEstimator):
    r"""SAMA (Choe et al., "Making scalable meta learning practical", NeurIPS 2023).

    .. math:: p = - \left( \frac{\partial U}{\partial g} \right)^{\!\top} v_0
              \qquad \theta' = U(\theta, s, g)

    The identity in place of the inverse Hessian, times the derivative of the inner optimizer's step :math:`U` with
    respect to its gradient: for Adam with its moments :math:`s` a diagonal that is large where gradients were small,
    for SGD the learning rate. It is the hypergradient of the step that the inner optimizer would take next. The paper's
    product is a central difference of gradients, which is the default here too. (Clipping of the gradient is left out,
    as in the paper.)

    Cost: three gradients (the one at :math:`\theta` and two for the product), first-order memory and two vectors. The
    right one at sizes where second derivatives are out of reach, with an adaptive inner optimizer.

    Args:
        product: How to get the product. Default: :class:`~diopt_lightning.bilevel.FiniteDifference`, central, without
            its check, whose memory is what this estimator avoids.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`; the residual is that of the best multiple
    of :math:`p`, so it measures the direction alone.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi],
        ...     inner_optimizer=torch.optim.SGD([theta], lr=0.5),
        ... )
        >>> gradient = SAMA()(problem).gradient  # after the step, theta = 0.5 phi: 0.5 (theta - 3)
        >>> round(gradient[0].item(), 2)
        -1.5
    """

    scale_free = True

    def __init__(self, product: Product | None = None) -> None:
        super().__init__(product if product is not None else FiniteDifference(check=False))

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Pull ``v0`` back through the next step of the optimizer; see :class:`ImplicitEstimator`."""
        problem = linearization.problem
        step = InnerStep.next_of(problem.inner_optimizer, problem.inner_parameters, clip=None)
        _, of_gradient, _ = step.adjoint(linearization.gradient(), v0, [])
        return Solution(scale(of_gradient, -1.0))
