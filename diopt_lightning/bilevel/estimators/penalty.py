"""The penalty method: hypergradients from first derivatives at two points."""

import time
from typing import Any

from diopt_lightning.bilevel.estimators.base import (
    Hypergradient,
    HypergradientEstimator,
    inner_gradients,
    outer_gradients,
)
from diopt_lightning.bilevel.estimators.implicit import DIVERGED
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products.finite_difference import Differences, FiniteDifference, distance
from diopt_lightning.bilevel.products.perturbation import move, restored
from diopt_lightning.bilevel.sharding import placed, whole
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm, scale
from diopt_lightning.errors import ConfigurationError, require_at_least


class Penalty(HypergradientEstimator):
    r"""The penalty, or value function, method: first derivatives only.

    (Kwon et al., "A fully first-order method for stochastic bilevel optimization", ICML 2023; Pan et al., "ScaleBiO",
    ACL 2025, which trained 30B parameters with it.) The inner problem becomes a penalty for its optimality gap,
    :math:`L_{val}(\theta, \phi) + \alpha (L_{train}(\theta, \phi) - \min_\omega L_{train}(\omega, \phi))`, whose
    derivative needs no second derivatives:

    .. math:: \frac{dL_{val}}{d\phi} \approx \frac{\partial L_{val}(\omega, \phi)}{\partial\phi}
              + \alpha \left( \frac{\partial L_{train}(\theta_\alpha, \phi)}{\partial\phi}
              - \frac{\partial L_{train}(\omega, \phi)}{\partial\phi} \right)

    :math:`\omega` is the model that is trained. :math:`\theta_\alpha` is found from it by ``steps`` of gradient descent
    on :math:`L_{val} / \alpha + L_{train} - \langle \nabla L_{train}(\omega), \theta - \omega \rangle`. The last term
    is zero at an optimum. The papers do without it and train both models side by side; it takes out of the difference
    what :math:`L_{train}` would still gain from more steps, so that an :math:`\omega` that is not converged needs no
    second model. As :math:`\alpha` grows, the estimate is that of a Neumann series with forward differences.

    Cost: ``2 steps + 1`` gradients, first-order memory, three vectors of theta's size, any attention kernel and any
    parallel strategy. The right one for models whose second derivatives are out of reach, where
    :class:`~diopt_lightning.bilevel.Identity` is too coarse.

    Args:
        steps: Steps of gradient descent to the second point. Default: 5.
        multiplier: That of the penalty. Default: so that the second point is as far from the first as the step of a
            forward :class:`~diopt_lightning.bilevel.FiniteDifference`, or closer (down to 1/64 of it) where gradients
            have kinks so far apart, as with ReLU. A smaller one is biased, a larger one is lost in rounding.
        step_size: That of gradient descent. Default: 1 over the largest eigenvalue, estimated from differences.
        warm_start: Whether to start as far from the first point as the last time, as the papers' single loop does with
            one step. Default: no.
        spectrum: How the largest eigenvalue is estimated, where ``step_size`` is not given.

    Statistics: ``residual``, the norm of :math:`v_0 + \alpha (\nabla L_{train}(\theta_\alpha) - \nabla
    L_{train}(\omega))` relative to :math:`v_0`; ``products``, of two gradients each; ``multiplier``, ``step_size``,
    ``largest_eigenvalue`` and ``seconds``.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi]
        ... )
        >>> gradient = Penalty()(problem).gradient
        >>> round(gradient[0].item(), 1)
        -2.0
    """

    supports_sharding = True

    def __init__(
        self,
        steps: int = 5,
        multiplier: float | None = None,
        step_size: float | None = None,
        warm_start: bool = False,
        spectrum: Spectrum | None = None,
    ) -> None:
        require_at_least(1, steps=steps)
        for name, value in {"multiplier": multiplier, "step_size": step_size}.items():
            if value is not None and not value > 0:
                raise ConfigurationError(f"`{name}` must be positive, got {value}. Leave it out to have it chosen.")
        self.steps = steps
        self.multiplier = multiplier
        self.step_size = step_size
        self.warm_start = warm_start
        self.spectrum = spectrum if spectrum is not None else Spectrum()
        self._offset: Vector | None = None
        self._times: float | None = None

    def reset(self) -> None:
        """Forget the last offset and the spectrum too; see :class:`HypergradientEstimator`."""
        super().reset()
        self._offset = self._times = None
        self.spectrum.reset()

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        """Find the second point and take the difference; see :class:`HypergradientEstimator`."""
        start = time.perf_counter()
        outer_loss, v0, direct = outer_gradients(problem)
        inner_loss, gradient, mixed = inner_gradients(problem)
        step_size = self._step_size(problem, v0)
        multiplier = self.multiplier or self._multiplier(problem, v0, step_size)
        with restored(problem.inner_parameters):
            offset = self._descend(problem, scale(v0, 1 / multiplier), gradient, multiplier, step_size)
            _, gradient_there, mixed_there = inner_gradients(problem)
        change = add(gradient_there, gradient, -1.0)
        residual, size = norm(add(v0, change, multiplier)).item(), norm(v0).item()
        statistics = {
            "residual": residual / size if size > 0 else 0.0,
            "products": float(self.steps),
            "multiplier": multiplier,
            "step_size": step_size,
            **self.spectrum.statistics(),
        }
        if statistics["residual"] > DIVERGED:
            self._diverged(offset, change, statistics)
        if self.warm_start:
            self._offset = offset
        statistics["seconds"] = time.perf_counter() - start
        return Hypergradient(add(direct, add(mixed_there, mixed, -1.0), multiplier), outer_loss, inner_loss, statistics)

    def _descend(
        self, problem: BilevelProblem, force: Vector, gradient: Vector, multiplier: float, step_size: float
    ) -> Vector:
        """Move the inner parameters to the second point, from a first ``force``; return the way."""
        parameters = problem.inner_parameters
        offset, remaining = scale(force, -step_size), self.steps - 1
        if self._offset is not None:
            offset, remaining = placed(self._offset, gradient), self.steps
        move(parameters, offset, 1.0)
        for _ in range(remaining):
            force = add(inner_gradients(problem)[1], gradient, -1.0)
            force = add(force, outer_gradients(problem)[1], 1 / multiplier)
            move(parameters, force, -step_size)
            offset = add(offset, force, -step_size)
        return offset

    def _step_size(self, problem: BilevelProblem, v0: Vector) -> float:
        """The step size, for which spectrum and distance of differences are found out where that is due."""
        estimated = self.step_size is None and self.spectrum.due
        if estimated or (self.multiplier is None and self._times is None):
            linearization = Differences(problem, FiniteDifference("forward", check=False))
            self._times = linearization.choose_distance(v0)
            if estimated:
                self.spectrum.refresh(linearization, v0)
        elif self.step_size is None:
            self.spectrum.grow_older()
        return self.step_size or (1 / self.spectrum.largest if self.spectrum.largest else 1.0)

    def _multiplier(self, problem: BilevelProblem, v0: Vector, step_size: float) -> float:
        """The multiplier with which ``steps`` of the first step's length end at the distance of a difference."""
        length = (self._times or 1.0) * distance(problem, "forward")
        return max(self.steps * step_size * norm(v0).item() / length, 1e-30)

    def _diverged(self, offset: Vector, change: Vector, statistics: dict[str, float]) -> None:
        self.spectrum.expire()
        curvature = norm(change).item() / norm(offset).item()
        if dot(offset, change).item() > 0:
            advice = (
                f"the curvature on the way was {curvature:.3g}: set `step_size` to {1 / curvature:.3g} or less (now "
                f"{statistics['step_size']:.3g}), or leave it out to have it estimated"
            )
        else:
            advice = f"the way followed negative curvature: use fewer `steps` (now {self.steps})"
        self.warn_once(
            f"Penalty diverges: after {self.steps} steps the residual is {statistics['residual']:.3g} times the "
            f"right-hand side; {advice}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the last offset, if it is needed, and the state of the spectrum."""
        offset = whole(self._offset) if self._offset is not None else None
        kept = {"offset": offset, "times": self._times}
        return kept | {"warned": self._warned, "spectrum": self.spectrum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._offset, self._warned = state["offset"], state["warned"]
        times = state.get("times")  # which older checkpoints do not have
        self._times = None if times is None else float(times)
        self.spectrum.load_state_dict(state["spectrum"])
