"""Products from differences of gradients: first derivatives only."""

import logging
import math
import warnings
from contextlib import AbstractContextManager
from typing import Literal

import torch

from diopt_lightning.bilevel.autocast import Autocast
from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products.base import Linearization, Product, checkpointing_explained, differentiate, zeros
from diopt_lightning.bilevel.products.double_backward import DoubleBackward, check_reached
from diopt_lightning.bilevel.products.perturbation import move, restored
from diopt_lightning.bilevel.sharding import any_sharded
from diopt_lightning.bilevel.vectors import Vector, add, as_vector, norm, scale
from diopt_lightning.bilevel.warning import ConvergenceWarning
from diopt_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)

# A relative error of a product that is warned of: beyond it the differences are dominated by kinks or by rounding.
INACCURATE = 0.05
# A relative change of a product with the distance that is warned of: kinks alone, which make errors of two distances,
# may change it by less.
ROUNDING = 0.5
# Distances that are tried, where one may be chosen. Still shorter ones are rounding error.
DISTANCES = (1.0, 1 / 4, 1 / 16, 1 / 64)


class FiniteDifference(Product):
    r"""Products from differences of gradients.

    With :math:`g = \nabla_{(\theta, \phi)} L_{train}`,

    .. math:: (H v, J^\top v) \approx \frac{g(\theta + \epsilon v) - g(\theta)}{\epsilon} \quad\text{(forward)}
              \qquad \frac{g(\theta + \epsilon v) - g(\theta - \epsilon v)}{2 \epsilon} \quad\text{(central)}

    First-order memory, any attention kernel, compiled modules, any parallel strategy. A forward product costs one
    gradient (and one for the base, once), a central one two. Errors are of order :math:`\epsilon` and
    :math:`\epsilon^2`; rounding adds the dtype's precision over :math:`\epsilon`. The step is that of Walker and
    Pernice ("NITSOL", SIAM J. Sci. Comput. 1998),

    .. math:: \epsilon = c \, \sqrt{1 + \|\theta\|} \, / \, \|v\|

    with :math:`c` one quarter of the square root of the dtype's precision (forward) or a sixteenth of its cube root
    (central): the orders at which both errors balance, with factors that were best on T5 and Llama models of 3,000 to
    300,000 parameters in float32, where errors of 1e-2 and 1e-3 are left.

    The gradient must be smooth. On networks with kinks (ReLU) the products are wrong by 20% and more at every step
    size. So the first product of a run is compared with an exact one, where the model allows that: the relative error
    goes to the statistics as ``finite_difference_error``, and one above 5% is warned of. This check needs the memory
    of :class:`~diopt_lightning.bilevel.DoubleBackward` once. Where that is not possible, the first product is compared
    with one at twice the distance, which tells rounding error, as beside frozen weights in half precision, from
    derivatives, and does not tell how far kinks are off: a change of more than half is warned of.

    Args:
        scheme: ``forward`` or ``central``. Default: ``central``, which costs twice as much and is ten times as
            accurate in float32.
        check: Whether to compare the first product with an exact one. Default: yes; say no where its memory is out of
            reach, for the comparison of two distances.
        fraction: Share of the micro-batches that the Hessian is computed on; see :class:`Product`.

    Raises:
        ConfigurationError: If ``scheme`` is neither, or parameters are of half precision.

    Example:
        >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(lambda: (phi * theta**2).sum(), lambda: theta.sum(), [theta], [phi])
        >>> with FiniteDifference().linearize(problem) as linearization:
        ...     curvature, mixed = linearization.both([torch.tensor([3.0])])
        >>> round(curvature[0].item(), 2)
        6.0
    """

    supports_sharding = True

    def __init__(
        self, scheme: Literal["forward", "central"] = "central", check: bool = True, fraction: float = 1.0
    ) -> None:
        super().__init__(fraction)
        if scheme not in ("forward", "central"):
            raise ConfigurationError(f"`scheme` must be forward or central, got {scheme!r}.")
        self.scheme = scheme
        self.check = check
        self._checked = False
        #: The distance of the two gradients in units of the one above.
        self.times = 1.0

    def reset(self) -> None:
        """Check the next product again; see :class:`Product`."""
        self._checked = False

    def at(self, problem: BilevelProblem) -> Linearization:
        """Return the linearization; see :class:`Product`.

        Raises:
            ConfigurationError: If parameters are of half precision.
        """
        return Differences(problem, self)

    def guard(self) -> AbstractContextManager[None]:
        """No second derivative is taken; see :class:`Product`."""
        return checkpointing_explained()

    def compare(self, linearization: "Differences", v: Vector, found: Vector) -> None:
        """Compare the first product of a run with an exact one, or with one at another distance; say what came out."""
        if self._checked:
            return
        self._checked = True
        if not self.check or any_sharded(v):
            self._compare_distances(linearization, v, found)
            return
        try:
            with DoubleBackward(self.fraction).linearize(linearization.problem) as exact:
                expected = exact.hessian(v)
        except ConfigurationError as error:
            log.warning("FiniteDifference could not be checked against an exact product: %s", error)
            self._compare_distances(linearization, v, found)
            return
        size = norm(expected).item()
        wrong = norm(add(found, expected, -1.0)).item() / size if size > 0 else norm(found).item()
        linearization.statistics["finite_difference_error"] = wrong
        log.info("FiniteDifference: relative error %.1e of the first product.", wrong)
        if wrong > INACCURATE:
            warnings.warn(
                f"Products by FiniteDifference(scheme={self.scheme!r}) are wrong by {wrong:.0%}: the model has kinks "
                "(ReLU; a gated GELU or SiLU has none), dropout that is on, or too low a precision. Use "
                "`DoubleBackward` or `ReverseOverForward` as the `product`"
                + (", or scheme `central`." if self.scheme == "forward" else "."),
                ConvergenceWarning,
                stacklevel=2,
            )

    def _compare_distances(self, linearization: "Differences", v: Vector, found: Vector) -> None:
        changed = linearization.change(v, found)
        if changed > ROUNDING:
            warnings.warn(
                f"Products by FiniteDifference(scheme={self.scheme!r}) change by {changed:.0%} with the distance of "
                "the two gradients: they are rounding error (are there frozen weights in half precision?) or the model "
                "has kinks. Keep all weights in float32, or use an estimator with `DoubleBackward` as its `product`.",
                ConvergenceWarning,
                stacklevel=2,
            )


def distance(problem: BilevelProblem, scheme: Literal["forward", "central"]) -> float:
    r"""How far to move parameters for a difference, :math:`c \sqrt{1 + \|\theta\|}`; see :class:`FiniteDifference`.

    Raises:
        ConfigurationError: If parameters are of half precision, or autocast computes in it.
    """
    parameters = problem.inner_parameters
    half = {parameter.dtype for parameter in parameters if torch.finfo(parameter.dtype).bits < 32}
    if half:
        raise ConfigurationError(
            f"A finite difference moves parameters by less than {half.pop()} can hold. Keep them in float32, or use "
            "`DoubleBackward` or `ReverseOverForward` as the `product`."
        )
    casts = (problem.autocast or Autocast(parameters)).dtype
    if casts is not None:
        raise ConfigurationError(
            f"A finite difference of gradients that autocast computes in {casts} is rounding error. Train with "
            "`trainer.precision: 32-true`, or use an estimator with `DoubleBackward` or `ReverseOverForward` as its "
            "`product`."
        )
    precision: float = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    factor: float = precision ** (1 / 2) / 4 if scheme == "forward" else precision ** (1 / 3) / 16
    return factor * math.sqrt(1 + norm(as_vector(parameters, parameters)).item())


class Differences(Linearization):
    """Products from differences of gradients at one point; see :class:`FiniteDifference`."""

    def __init__(self, problem: BilevelProblem, product: FiniteDifference) -> None:
        super().__init__(problem, product.fraction)
        self._product = product
        self._distance = distance(problem, product.scheme)
        self._base = self._gradient() if product.scheme == "forward" else None

    def hessian(self, v: Vector) -> Vector:
        """``H v``; see :class:`Linearization`."""
        return self.both(v)[0]

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        """``(H v, J^T v)``; see :class:`Linearization`."""
        inner, outer = self.problem.inner_parameters, self.problem.outer_parameters
        if norm(v).item() == 0:
            return zeros(inner), zeros(outer)
        averaged = self.product(v, self._product.times)
        self._product.compare(self, v, averaged[: len(inner)])
        return averaged[: len(inner)], averaged[len(inner) :]

    def product(self, v: Vector, times: float) -> Vector:
        """Both products as one vector, from gradients that are so many ``times`` the usual distance apart."""
        step = times * self._distance / norm(v).item()
        if self._base is not None:
            products = scale(add(self._gradient_at(v, step), self._base, -1.0), 1 / step)
        else:
            products = scale(add(self._gradient_at(v, step), self._gradient_at(v, -step), -1.0), 0.5 / step)
        return self.problem.average(products)

    def change(self, v: Vector, found: Vector) -> float:
        """How much another distance, twice as far, changes a product that was found with ``v``, relative to it."""
        further, size = self.product(v, 2 * self._product.times)[: len(found)], norm(found).item()
        return norm(add(further, found, -1.0)).item() / size if size > 0 else norm(further).item()

    def choose_distance(self, v: Vector) -> float:
        """Take the first distance, or else the best, that leaves the product with ``v`` as it is when it is doubled.

        Where the gradient has kinks (ReLU), they are between points that are close more seldom.
        """
        changes = {}
        for times in DISTANCES if norm(v).item() > 0 else (1.0,):
            self._product.times = times
            changes[times] = self.change(v, self.product(v, times)[: len(v)]) if norm(v).item() > 0 else 0.0
            if changes[times] < INACCURATE:
                break
        self._product.times = min(changes, key=lambda times: changes[times])
        return self._product.times

    def _gradient_at(self, v: Vector, step: float) -> Vector:
        parameters = self.problem.inner_parameters
        with restored(parameters):
            move(parameters, v, step)
            return self._gradient()

    def _gradient(self) -> Vector:
        """The gradient with respect to theta, of the part for the curvature, and phi, of all micro-batches."""
        inner, outer = self.problem.inner_parameters, self.problem.outer_parameters
        total = zeros([*inner, *outer])
        for index, (_, weight) in enumerate(self.parts):
            gradient = differentiate(self.evaluate(index), self.problem)
            check_reached(gradient[: len(inner)])
            part = as_vector(gradient, [*inner, *outer])
            curvature = self.curvature_weights[index] if index < len(self.curvature_weights) else 0.0
            total = add(total, [*scale(part[: len(inner)], curvature), *scale(part[len(inner) :], weight)])
        return total

    def free(self) -> None:
        """Let go of the gradient at the base."""
        self._base = None
