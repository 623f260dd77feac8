"""Differentiation through the last inner steps."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diopt_lightning.bilevel.estimators.base import Hypergradient, HypergradientEstimator, check_finite, outer_gradients
from diopt_lightning.bilevel.estimators.inner_step import InnerStep, State
from diopt_lightning.bilevel.problem import BilevelProblem, Loss, MicroBatches
from diopt_lightning.bilevel.products.base import Product
from diopt_lightning.bilevel.products.double_backward import DoubleBackward
from diopt_lightning.bilevel.products.perturbation import assign, restored
from diopt_lightning.bilevel.vectors import add
from diopt_lightning.errors import ConfigurationError, require_at_least


@dataclass(frozen=True)
class Recorded:
    """An inner step as it was about to be taken: its loss, and what the optimizer started from."""

    inner_loss: Loss | MicroBatches
    step: InnerStep


class Unrolled(HypergradientEstimator):
    r"""Truncated back-propagation through the inner optimizer.

    (Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017; Shaban et al.,
    "Truncated back-propagation for bilevel optimization", AISTATS 2019.) The last :math:`T` inner steps
    :math:`(\theta_{k+1}, s_{k+1}) = U(\theta_k, s_k, g_k)`, with the optimizer's state :math:`s` and
    :math:`g_k = \nabla_\theta L_{train}(\theta_k, \phi)`, are differentiated in reverse: from
    :math:`a_T = \partial L_{val} / \partial\theta` at the current :math:`\theta_T`,

    .. math:: b_k = \left( \frac{\partial U}{\partial g} \right)^{\!\top} a_{k+1} \qquad
              a_k = \left( \frac{\partial U}{\partial \theta} \right)^{\!\top} a_{k+1} + H_k b_k \qquad
              \frac{dL_{val}}{d\phi} = \frac{\partial L_{val}}{\partial\phi} + \sum_k J_k^\top b_k

    and alike for the state. It asks for no convergence: it is the exact derivative of what the optimizer did, with its
    momentum, weight decay and clipped gradients, but of the last steps only. (For gradient descent at an optimum it is
    the Neumann series.) Losses are evaluated at the current :math:`\phi` and without dropout; steps before the last
    outer step are taken as if :math:`\phi` had been what it is now.

    Cost: one linearization and one product for each step, and ``steps`` copies of theta and the optimizer's state, made
    while the inner steps run (:meth:`observe`); of these a checkpoint has those that later steps will still be
    differentiated through, none at the end of a round of ``steps``. The right one for short inner loops and for inner
    optimizers far from convergence.

    Args:
        steps: T, the last inner steps to differentiate. Default: 1, which is DARTS's and MAML's.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`.

    Statistics: ``products``, ``seconds`` and ``steps``, the number of steps that were on record.

    Raises:
        ConfigurationError: If ``steps`` is below 1.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([theta], lr=0.5)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi],
        ...     inner_optimizer=optimizer,
        ... )
        >>> estimator = Unrolled(steps=2)
        >>> for _ in range(2):  # theta = 0.5 phi, then 0.75 phi
        ...     optimizer.zero_grad()
        ...     problem.inner_loss().backward(inputs=[theta])
        ...     estimator.observe(problem)
        ...     optimizer.step()
        >>> estimator(problem).gradient  # 0.75 (0.75 - 3)
        [tensor([-1.6875])]
    """

    @property
    def supports_sharding(self) -> bool:  # type: ignore[override]
        """Whether inner parameters may be sharded; that is the product's matter."""
        return self.product.supports_sharding

    def __init__(self, steps: int = 1, product: Product | None = None) -> None:
        require_at_least(1, steps=steps)
        self.steps = self.recorded_steps = steps
        self.product = product if product is not None else DoubleBackward()
        self._records: deque[Recorded] = deque(maxlen=steps)

    def reset(self) -> None:
        """Forget the steps on record, and check the product again; see :class:`HypergradientEstimator`."""
        super().reset()
        self.product.reset()
        self._records.clear()

    def observe(self, problem: BilevelProblem) -> None:
        """Keep what the next step starts from; see :class:`HypergradientEstimator`."""
        step = InnerStep.next_of(problem.inner_optimizer, problem.inner_parameters, problem.inner_gradient_clip)
        self._records.append(Recorded(problem.inner_loss, step))

    def recorded_state(self, number: int) -> list[dict[str, Any]]:
        """What the last steps started from; see :class:`HypergradientEstimator`."""
        records = list(self._records)
        return [record.step.saved() for record in records[len(records) - min(number, len(records)) :]]

    def restore_recorded(self, states: Sequence[dict[str, Any]], losses: Sequence[Loss | MicroBatches]) -> None:
        """Put steps on record; see :class:`HypergradientEstimator`."""
        self._records.clear()
        self._records.extend(Recorded(loss, InnerStep.of(saved)) for saved, loss in zip(states, losses, strict=True))

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        """Differentiate through the recorded steps; see :class:`HypergradientEstimator`."""
        if not self._records:
            raise ConfigurationError(
                "Unrolled has no inner steps on record: call `observe(problem)` after the backward pass of each and "
                "before its optimizer step. (BilevelModule does so by itself.)"
            )
        start = time.perf_counter()
        outer_loss, adjoint, gradient = outer_gradients(problem)
        of_state: list[State] = []
        parameters = problem.inner_parameters
        with restored(parameters):
            for number, record in enumerate(reversed(self._records), start=1):
                assign(parameters, record.step.parameters)
                with self.product.linearize(replace(problem, inner_loss=record.inner_loss)) as linearization:
                    inner_gradient = linearization.gradient()
                    adjoint, of_gradient, of_state = record.step.adjoint(inner_gradient, adjoint, of_state)
                    curvature, mixed = linearization.both(of_gradient)
                    if number == 1:
                        inner_loss = linearization.inner_loss
                adjoint, gradient = add(adjoint, curvature), add(gradient, mixed)
                check_finite([*adjoint, *gradient], f"inner step {number} from the last, through which it is unrolled")
        statistics = {"products": float(number), "steps": float(number), "seconds": time.perf_counter() - start}
        return Hypergradient(gradient, outer_loss, inner_loss, statistics)
