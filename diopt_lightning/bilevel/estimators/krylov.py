"""What solvers that build their solution from successive products share."""

from abc import abstractmethod
from typing import Any

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.sharding import placed, whole
from diopt_lightning.bilevel.vectors import Vector, add
from diopt_lightning.errors import ConfigurationError, require_at_least


class KrylovEstimator(ImplicitEstimator):
    r"""Finds :math:`p` in the space of :math:`v_0, H v_0, H^2 v_0, \dots`; subclasses say which one.

    With a damping :math:`\delta` the system that is solved is :math:`(H + \delta I) p = v_0`.

    Args:
        products: Products of a hypergradient, the last of which gives :math:`J^\top p` and the residual. (An estimate
            of the spectrum comes on top, now and then.)
        damping: What is added to every eigenvalue of the Hessian. Default: twice the lowest one seen where that is
            negative; of ``ConjugateGradient`` at least 1% of the largest one, too.
        warm_start: Whether to start from the last solution, which costs one of the products. Default: no; it pays
            where ``phi`` and ``theta`` move little between hypergradients and their batches are the same or large.
        spectrum: How the spectrum is estimated, where the solver needs it. Default:
            :class:`~diopt_lightning.bilevel.Spectrum` with 8 products every 50 hypergradients.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    spectrum: Spectrum

    def __init__(
        self,
        products: int,
        damping: float | None = None,
        warm_start: bool = False,
        spectrum: Spectrum | None = None,
        product: Product | None = None,
    ) -> None:
        super().__init__(product)
        require_at_least(1, products=products)
        require_at_least(0, hint="Leave it out to have it chosen.", damping=damping)
        if warm_start and products < 2:
            raise ConfigurationError("`warm_start` takes one of the `products` for itself: allow 2 or more.")
        self.products = products
        self.damping = damping
        self.warm_start = warm_start
        self.spectrum = spectrum if spectrum is not None else Spectrum()
        self._solution: Vector | None = None

    def reset(self) -> None:
        """Forget the last solution too; see :class:`HypergradientEstimator`."""
        super().reset()
        self._solution = None

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Solve the system from the last solution or from zero; see :class:`ImplicitEstimator`."""
        damping = self.prepare(linearization, v0)
        if self._solution is None:
            found = self.iterate(linearization, v0, self.products, damping)
            p = found.p
        else:
            last = placed(self._solution, v0)
            residual = add(v0, damped(linearization, last, damping), -1.0)
            found = self.iterate(linearization, residual, self.products - 1, damping)
            p = add(last, found.p)
        if self.warm_start:
            self._solution = p
        return Solution(p, damping, {"damping": damping, **self.spectrum.statistics(), **found.statistics})

    def prepare(self, linearization: Linearization, v0: Vector) -> float:
        """Return the damping, estimating the spectrum first where that is due and needed."""
        if self.damping is not None:
            return self.damping
        self.spectrum.refresh(linearization, v0)
        return self.automatic_damping()

    def automatic_damping(self) -> float:
        """Turn the lowest eigenvalue seen around, if it is negative: its share of ``v0`` is then not amplified."""
        return max(-2 * self.spectrum.lowest, 0.0)

    @abstractmethod
    def iterate(self, linearization: Linearization, right: Vector, products: int, damping: float) -> Solution:
        """Solve ``(H + damping) p = right`` with ``products - 1`` products: one more is spent on the solution."""

    def state_dict(self) -> dict[str, Any]:
        """Return the last solution, if it is needed, beside what every :class:`ImplicitEstimator` returns."""
        solution = whole(self._solution) if self._solution is not None else None
        return super().state_dict() | {"solution": solution}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._solution = state["solution"]


def damped(linearization: Linearization, v: Vector, damping: float) -> Vector:
    """Return ``(H + damping I) v``."""
    product = linearization.hessian(v)
    return add(product, v, damping) if damping else product
