"""The truncated Neumann series, the solver of the paper."""

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.vectors import Vector, add, scale
from diopt_lightning.errors import ConfigurationError, require_at_least


class Neumann(ImplicitEstimator):
    r"""Truncated Neumann series (Lorraine, Vicol and Duvenaud, AISTATS 2020; the solver of Isonuma et al. 2023).

    .. math:: H^{-1} v_0 \approx p = \gamma \sum_{m=0}^{M} (I - \gamma H)^m v_0

    It is what :math:`M + 1` steps of gradient descent on the inner loss would make of the hypergradient, and converges
    for :math:`0 < \gamma < 2 / \lambda_{max}` where :math:`H` is positive definite. A larger :math:`\gamma` does not
    fail: it flips the sign of the answer. A deep network's Hessian also has negative eigenvalues, along which every
    further term makes the answer worse. Both show in the residual, :math:`v_0 - H p = (I - \gamma H)^{M+1} v_0`. Where
    it is more than a tenth larger than :math:`v_0` itself, a :class:`~diopt_lightning.bilevel.ConvergenceWarning` says
    which of the two it is, and by how much.

    Cost: :math:`M + 1` products, two vectors of theta's size. The right one to compare with the paper; otherwise
    :class:`~diopt_lightning.bilevel.Chebyshev` makes more of the same products.

    Args:
        terms: M, the terms after the first. Default: 1, as in the paper's implementation.
        step_size: That of the series, in units of one over the Hessian's. Default: 1 over an estimate of the largest
            eigenvalue, which converges even if the estimate is too low by nearly one half.
        spectrum: How the largest eigenvalue is estimated, where ``step_size`` is not given. Default:
            :class:`~diopt_lightning.bilevel.Spectrum` with 8 products every 50 hypergradients.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`, and ``step_size``.

    Raises:
        ConfigurationError: If an argument is outside of its range.

    Example:
        >>> import torch
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.tensor([0.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
        >>> problem = BilevelProblem(
        ...     inner_loss=lambda: (theta - phi).square().sum() / 2,  # theta*(phi) = phi
        ...     outer_loss=lambda: (theta - 3).square().sum() / 2,
        ...     inner_parameters=[theta],
        ...     outer_parameters=[phi],
        ... )
        >>> gradient = Neumann(terms=20)(problem).gradient  # d/dphi of (phi - 3)^2 / 2, with theta = 0 for theta*
        >>> round(gradient[0].item(), 4)
        -3.0
    """

    def __init__(
        self,
        terms: int = 1,
        step_size: float | None = None,
        spectrum: Spectrum | None = None,
        product: Product | None = None,
    ) -> None:
        super().__init__(product)
        require_at_least(0, terms=terms)
        if step_size is not None and not step_size > 0:
            raise ConfigurationError(
                f"`step_size` must be positive, got {step_size}. Leave it out to have it estimated."
            )
        self.terms = terms
        self.step_size = step_size
        self.spectrum: Spectrum = spectrum if spectrum is not None else Spectrum()

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Sum the series; see :class:`ImplicitEstimator`."""
        if self.step_size is None:
            self.spectrum.refresh(linearization, v0)
        while True:
            # Without any curvature along v0 the solution is the same for every step size, up to its scale.
            step_size = self.step_size or 1 / (self.spectrum.largest or 1.0)
            term, total = v0, v0
            for _ in range(self.terms):
                curvature = linearization.hessian(term)
                if self.step_size is None and self.spectrum.exceeded(term, curvature, allowed=2.0):
                    break  # and start again: with this step size the series would diverge
                term = add(term, curvature, -step_size)
                total = add(total, term)
            else:
                statistics = {"step_size": step_size, **self.spectrum.statistics()}
                return Solution(scale(total, step_size), statistics=statistics)

    def advice(self, curvature: float, solution: Solution) -> str:
        """Which of the two causes it is, and what to set; see :class:`ImplicitEstimator`."""
        if curvature > 0:
            return (
                f" It lies along a curvature of {curvature:.3g}, and a step size above 2 / {curvature:.3g} turns the "
                f"hypergradient around: set `step_size` to {1 / curvature:.3g} or less (now "
                f"{solution.statistics['step_size']:.3g}), or leave it out to have it estimated."
            )
        return (
            f" It lies along a negative curvature of {curvature:.3g}: the inner problem is not at a minimum, and more "
            f"terms make it worse. Use fewer `terms` (now {self.terms}), `Chebyshev`, which damps negative curvature, "
            "or more inner steps before an outer one."
        )
