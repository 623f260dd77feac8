"""Chebyshev iteration: the Neumann series with the best steps for a given number of products."""

import math
from typing import Any

from diopt_lightning.bilevel.estimators.implicit import Solution
from diopt_lightning.bilevel.estimators.krylov import KrylovEstimator, damped
from diopt_lightning.bilevel.products.base import Linearization
from diopt_lightning.bilevel.vectors import Vector, add, scale
from diopt_lightning.errors import ConfigurationError

# Lower ends that are compared, and the length of the shortest interval: with it the iteration is a Neumann series.
STEPS, SHORTEST = 40, 1e-3


class Chebyshev(KrylovEstimator):
    r"""Chebyshev iteration: the polynomial of the Hessian with the smallest residual.

    (Golub and Varga, "Chebyshev semi-iterative methods", Numerische Mathematik 1961; Saad, "Iterative methods for
    sparse linear systems", section 12.3.) After :math:`M` products the residual is that polynomial of :math:`A = H +
    \delta I` which is smallest on :math:`[a, b]`,

    .. math:: v_0 - A p = \frac{T_M\left(\frac{a + b - 2 A}{b - a}\right)}{T_M\left(\frac{a + b}{b - a}\right)} \, v_0 ,

    where a Neumann series has :math:`(I - \gamma A)^M`. :math:`b` is the estimated :math:`\lambda_{max}`. The lower end
    :math:`a` follows from what the products can do: the lowest one is that for which the residual is at most
    ``accuracy`` everywhere on :math:`[a, b]`; below it, down to zero, the residual goes on to one, as in a series that
    is cut short. So more products reach lower, and there is nothing to tune. Where the estimate of the spectrum shows
    that nothing lies so low, or little of :math:`v_0`, :math:`a` is the one that leaves the smallest error in :math:`p`
    (up to :math:`b`, which is the Neumann series): more products are better on easy problems, too.

    Where the Hessian has negative eigenvalues, as a deep network's has, a damping of twice the lowest one seen keeps
    the polynomial from growing there, and is the default; where they are small beside :math:`a` it changes nothing.

    Cost: ``products``, three vectors of theta's size, no inner products of vectors. The right one in general: against a
    dense solve of small T5 and Llama models, and against training again, it is with 5 products about where a Neumann
    series is with 20 (the tables are in ``diopt_lightning/bilevel/README.md``).

    Args:
        products: M, the products with the Hessian that a hypergradient takes. Default: 5.
        accuracy: The relative residual that is allowed on the interval. Default: at most 0.5 over ``products``, so 0.1
            with 5, and less where the spectrum allows it. Lower values make the large eigenvalues' part more exact and
            reach less far down; a fixed one is a floor that further products cannot pass.
        options: ``damping``, ``warm_start``, ``spectrum`` and ``product`` of
            :class:`~diopt_lightning.bilevel.KrylovEstimator`.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`, and ``damping``.

    Raises:
        ConfigurationError: If an argument is outside of its range.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi]
        ... )
        >>> gradient = Chebyshev(products=10, accuracy=1e-3)(problem).gradient
        >>> round(gradient[0].item(), 2)
        -3.0
    """

    def __init__(self, products: int = 5, accuracy: float | None = None, **options: Any) -> None:
        super().__init__(products, **options)
        if accuracy is not None and not 0 < accuracy < 1:
            raise ConfigurationError(f"`accuracy` must lie between 0 and 1, got {accuracy}.")
        self.accuracy = accuracy

    def prepare(self, linearization: Linearization, v0: Vector) -> float:
        """Return the damping; the spectrum is needed in any case."""
        self.spectrum.refresh(linearization, v0)
        return self.automatic_damping() if self.damping is None else self.damping

    def iterate(self, linearization: Linearization, right: Vector, products: int, damping: float) -> Solution:
        """Run the three-term recurrence; see :class:`KrylovEstimator`."""
        while True:
            upper = (self.spectrum.largest or 1.0) + damping
            lower = self.lower_end(products, upper, damping)
            center, half = (upper + lower) / 2, (upper - lower) / 2
            residual, update = right, scale(right, 1 / center)
            total, ratio = update, half / center
            for _ in range(products - 1):
                product = damped(linearization, update, damping)
                if self.spectrum.exceeded(update, product, allowed=upper / (self.spectrum.largest or 1.0)):
                    break  # and start again: beyond the interval the polynomial grows fast
                residual = add(residual, product, -1.0)
                following = 1 / (2 * center / half - ratio)
                update = add(scale(update, following * ratio), residual, 2 * following / half)
                total, ratio = add(total, update), following
            else:
                return Solution(total)

    def lower_end(self, products: int, upper: float, damping: float) -> float:
        """The lower end of the interval, where ``upper`` is the other one."""
        lowest = upper / condition(products, self.accuracy or 0.5 / self.products)
        if self.accuracy is not None or not self.spectrum.ritz:
            return lowest
        ends: list[float] = [(1 - SHORTEST) * upper * (lowest / upper) ** (step / STEPS) for step in range(STEPS + 1)]

        def error(lower: float) -> float:
            total = 0.0
            for value, uncertain, share in self.spectrum.ritz:
                at_worst = max(value - uncertain + damping, lowest)
                total += share * (bound(products, lower, upper, at_worst) / at_worst) ** 2
            return total

        return min(ends, key=error)

    def advice(self, curvature: float, solution: Solution) -> str:
        """What to set; see :class:`ImplicitEstimator`."""
        if curvature < 0:
            return (
                f" It lies along a negative curvature of {curvature:.3g}: set `damping` to {-2 * curvature:.3g} or "
                "more, or take more inner steps before an outer one."
            )
        return (
            f" It lies along a curvature of {curvature:.3g}: use fewer `products` (now {self.products}), or refresh "
            f"the `spectrum` more often (now every {self.spectrum.refresh_every} hypergradients)."
        )


def bound(products: int, lower: float, upper: float, eigenvalue: float) -> float:
    r"""The most that is left of the residual at an eigenvalue, with an interval from ``lower`` to ``upper``.

    Example:
        >>> round(bound(5, 1 / 11.8, 1.0, 0.5), 2), bound(5, 1 / 11.8, 1.0, 0.0)
        (0.1, 1.0)
    """
    at_zero, there = (math.acosh(max((upper + lower - 2 * x) / (upper - lower), 1.0)) for x in (0.0, eigenvalue))
    # The ratio of two hyperbolic cosines, which are large.
    decay = math.exp(products * (there - at_zero))
    return decay * (1 + math.exp(-2 * products * there)) / (1 + math.exp(-2 * products * at_zero))


def condition(products: int, accuracy: float) -> float:
    r"""The largest :math:`b / a` for which so many products leave at most ``accuracy`` of the residual on [a, b].

    It solves :math:`T_M(\frac{b + a}{b - a}) = 1 / \text{accuracy}` with :math:`T_M(\cosh x) = \cosh M x`.

    Example:
        >>> round(condition(products=5, accuracy=0.1), 1)
        11.8
    """
    argument = math.cosh(math.acosh(1 / accuracy) / products)
    return (argument + 1) / (argument - 1)
