"""What solvers that build their solution from successive products share."""

from abc import abstractmethod
from typing import Any

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.sharding import placed, whole
from diopt_lightning.bilevel.vectors import Vector, add
from diopt_lightning.errors import ConfigurationError


class KrylovEstimator(ImplicitEstimator):
    r"""Finds :math:`p` in the space of :math:`v_0, H v_0, H^2 v_0, \dots`; subclasses say which one.

    Args:
        products: Products of a hypergradient, the last of which gives :math:`J^\top p` and the residual. (An estimate
            of the spectrum comes on top, now and then.)
        damping: :math:`\delta \ge 0` of the system :math:`(H + \delta I) p = v_0` that is solved instead. ``None`` to
            have it chosen from the spectrum.
        warm_start: Whether to start from the last solution, which costs one of the products, instead of from zero.
        spectrum: How the spectrum is estimated.
        product: How to get products with second derivatives.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    def __init__(
        self,
        products: int,
        damping: float | None,
        warm_start: bool,
        spectrum: Spectrum | None,
        product: Product | None,
    ) -> None:
        super().__init__(product)
        if products < 1:
            raise ConfigurationError(f"`products` must be 1 or more, got {products}.")
        if damping is not None and not damping >= 0:
            raise ConfigurationError(f"`damping` must be 0 or more, got {damping}. Leave it out to have it chosen.")
        if warm_start and products < 2:
            raise ConfigurationError("`warm_start` takes one of the `products` for itself: allow 2 or more.")
        self.products = products
        self.damping = damping
        self.warm_start = warm_start
        self.spectrum: Spectrum = spectrum if spectrum is not None else Spectrum()
        self._solution: Vector | None = None
        self._damping = 0.0

    def solve(self, linearization: Linearization, v0: Vector) -> Vector:
        """Solve the system from the last solution or from zero; see :class:`ImplicitEstimator`."""
        damping = self._damping = self.prepare(linearization, v0)
        if self._solution is None:
            solution = self.iterate(linearization, v0, self.products, damping)
        else:
            last = placed(self._solution, v0)
            residual = add(v0, damped(linearization, last, damping), -1.0)
            solution = add(last, self.iterate(linearization, residual, self.products - 1, damping))
        if self.warm_start:
            self._solution = solution
        return solution

    def prepare(self, linearization: Linearization, v0: Vector) -> float:
        """Return the damping, estimating the spectrum first where that is due and needed."""
        if self.damping is not None:
            return self.damping
        self.spectrum.refresh(linearization, v0)
        return self.automatic_damping()

    def automatic_damping(self) -> float:
        """The damping that follows from the spectrum. Default: none."""
        return 0.0

    @abstractmethod
    def iterate(self, linearization: Linearization, right: Vector, products: int, damping: float) -> Vector:
        """Solve ``(H + damping) p = right`` with ``products - 1`` products: one more is spent on the solution."""

    @property
    def used_damping(self) -> float:
        """The damping of the last system; see :class:`ImplicitEstimator`."""
        return self._damping

    def solver_statistics(self) -> dict[str, float]:
        """The damping and the largest eigenvalue, if it was estimated; see :class:`ImplicitEstimator`."""
        return {"damping": self._damping, **self.spectrum.statistics()}

    def state_dict(self) -> dict[str, Any]:
        """Return the last solution, if it is needed, and the state of the spectrum."""
        solution = whole(self._solution) if self._solution is not None else None
        return super().state_dict() | {"solution": solution, "spectrum": self.spectrum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._solution = state["solution"]
        self.spectrum.load_state_dict(state["spectrum"])


def damped(linearization: Linearization, v: Vector, damping: float) -> Vector:
    """Return ``(H + damping I) v``."""
    product = linearization.hessian(v)
    return add(product, v, damping) if damping else product
