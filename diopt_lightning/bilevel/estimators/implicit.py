"""Implicit differentiation: hypergradients from a linear system with the inner Hessian."""

import time
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diopt_lightning.bilevel.estimators.base import Hypergradient, HypergradientEstimator, check_finite, outer_gradients
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.products.double_backward import DoubleBackward
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm

# A relative residual that is warned of. A short step along weak negative curvature ends a little above 1, harmlessly.
DIVERGED = 1.1


@dataclass(frozen=True)
class Solution:
    r"""What a solver has found.

    Args:
        p: The solution, in the shapes of the inner parameters.
        damping: :math:`\delta`, where the system that was solved is :math:`(H + \delta I) p = v_0`: by its own residual
            it is judged whether the solver diverges.
        statistics: What the solver adds to the statistics of the hypergradient, by name.
    """

    p: Vector
    damping: float = 0.0
    statistics: dict[str, float] = field(default_factory=dict)


class ImplicitEstimator(HypergradientEstimator):
    r"""Implicit differentiation of the inner problem: subclasses say how the linear system is solved.

    At an inner optimum the implicit function theorem gives, with :math:`v_0 = \partial L_{val} / \partial\theta`,

    .. math:: \frac{dL_{val}}{d\phi} = \frac{\partial L_{val}}{\partial\phi} - J^\top p
              \quad \text{with} \quad H p = v_0 .

    (Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020.)
    The last product gives :math:`H p` together with :math:`J^\top p`, so every estimate comes with its residual.

    Statistics: ``residual``, :math:`\|v_0 - H p\| / \|v_0\|`: near 0 the hypergradient is that of the converged inner
    problem, above 1 it is further from it than no answer at all. ``products`` and ``seconds``.
    ``largest_eigenvalue``, an estimate from below: what a solver found out, or the largest :math:`\|H x\| / \|x\|` met.
    ``negative_curvature``, the lowest :math:`\langle x, H x \rangle / \langle x, x \rangle` met, or 0 if none was
    negative.

    Args:
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`, which is exact.
    """

    #: Whether the scale of ``p`` means nothing. The residual is then that of the best multiple of ``p``.
    scale_free = False
    #: The estimate of the inner Hessian's spectrum, where the solver needs one.
    spectrum: Spectrum | None = None

    def __init__(self, product: Product | None = None) -> None:
        self.product = product if product is not None else DoubleBackward()

    @property
    def supports_sharding(self) -> bool:  # type: ignore[override]
        """Whether inner parameters may be sharded; that is the product's matter."""
        return self.product.supports_sharding

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        """Estimate the hypergradient; see :class:`HypergradientEstimator`."""
        start = time.perf_counter()
        # The outer loss goes first: its graph is freed before the larger one of the inner gradient is built.
        outer_loss, v0, direct = outer_gradients(problem)
        with self.product.linearize(problem) as linearization:
            metered = Metered(linearization)
            solution = self.solve(metered, v0)
            curvature, mixed = metered.both(solution.p)
            inner_loss = metered.inner_loss
            metered.check_finite()
            check_finite([*solution.p, *mixed], f"the solution of {type(self).__name__}")
            size = norm(v0).item() or 1.0
            statistics = {
                "residual": norm(self._residual(v0, curvature)).item() / size,
                **metered.measured(),
                **solution.statistics,
                **metered.statistics,
            }
            residual = self._residual(v0, add(curvature, solution.p, solution.damping))
            if norm(residual).item() > DIVERGED * size:
                self._diverged(metered, residual, size, solution)
        statistics["seconds"] = time.perf_counter() - start
        return Hypergradient(add(direct, mixed, -1.0), outer_loss, inner_loss, statistics)

    @abstractmethod
    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Solve ``H p = v0`` approximately."""

    def advice(self, curvature: float, solution: Solution) -> str:
        """What to set instead, given the curvature along the residual of a solution, which has grown."""
        return f" The curvature along it is {curvature:.3g}."

    def _residual(self, v0: Vector, curvature: Vector) -> Vector:
        size = dot(curvature, curvature).item() if self.scale_free else 0.0
        return add(v0, curvature, -dot(v0, curvature).item() / size if size > 0 else -1.0)

    def _diverged(self, metered: "Metered", residual: Vector, size: float, solution: Solution) -> None:
        """Warn once, with the number to set, and do not trust an old estimate of the spectrum."""
        if self.spectrum is not None:
            self.spectrum.expire()
        if self._warned:  # no product for nothing
            return
        curvature = (dot(residual, metered.hessian(residual)) / dot(residual, residual)).item()
        self.warn_once(
            f"{type(self).__name__} diverges: after {metered.measured()['products'] - 1:.0f} products the residual is "
            f"{norm(residual).item() / size:.3g} times the right-hand side." + self.advice(curvature, solution)
        )

    def reset(self) -> None:
        """Forget the spectrum too, and check the product again; see :class:`HypergradientEstimator`."""
        super().reset()
        self.product.reset()
        if self.spectrum is not None:
            self.spectrum.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return whether a warning was given, and the state of the spectrum; subclasses add to it."""
        spectrum = {"spectrum": self.spectrum.state_dict()} if self.spectrum is not None else {}
        return {"warned": self._warned} | spectrum

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._warned = state["warned"]
        if self.spectrum is not None:
            self.spectrum.load_state_dict(state["spectrum"])


class Metered(Linearization):
    """A linearization that counts its products and measures the curvature that they show, without waiting for it.

    Args:
        linearization: What to measure.
    """

    def __init__(self, linearization: Linearization) -> None:
        super().__init__(linearization.problem, linearization.fraction)
        self.statistics = linearization.statistics
        self._linearization = linearization
        self._sizes: list[Tensor] = []
        self._curvatures: list[Tensor] = []
        self._growths: list[Tensor] = []

    @property
    def inner_loss(self) -> Tensor:
        """The value of the inner loss; see :class:`Linearization`."""
        return self._linearization.inner_loss

    def evaluate(self, index: int) -> Tensor:
        """The loss of a micro-batch; see :class:`Linearization`."""
        return self._linearization.evaluate(index)

    def gradient(self) -> Vector:
        """The inner gradient; see :class:`Linearization`."""
        return self._linearization.gradient()

    def hessian(self, v: Vector) -> Vector:
        """``H v``; see :class:`Linearization`."""
        product = self._linearization.hessian(v)
        self._measure(v, product)
        return product

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        """``(H v, J^T v)``; see :class:`Linearization`."""
        product, mixed = self._linearization.both(v)
        self._measure(v, product)
        return product, mixed

    def _measure(self, v: Vector, product: Vector) -> None:
        squared, size = dot(v, v), norm(product)
        squared = torch.where(squared > 0, squared, torch.ones_like(squared))  # the zero vector has no curvature
        self._sizes.append(size)
        self._curvatures.append(dot(v, product) / squared)
        self._growths.append(size / squared.sqrt())

    def measured(self) -> dict[str, float]:
        """The number of products and the extremes of the curvature; see :class:`ImplicitEstimator`."""
        return {
            "products": float(len(self._sizes)),
            "largest_eigenvalue": torch.stack(self._growths).max().item(),
            "negative_curvature": min(torch.stack(self._curvatures).min().item(), 0.0),
        }

    def check_finite(self) -> None:
        """Raise if a product was not finite, with its number.

        Raises:
            FloatingPointError: If one was not.
        """
        for number, size in enumerate(self._sizes, start=1):
            check_finite([size], f"product {number} of {len(self._sizes)} with the inner loss's second derivatives")
