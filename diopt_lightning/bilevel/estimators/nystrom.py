"""A low-rank sketch of the Hessian, inverted in closed form."""

from typing import Any

import torch
from torch import Tensor

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.vectors import Vector
from diopt_lightning.errors import ConfigurationError, require_at_least


class Nystrom(ImplicitEstimator):
    r"""The Nystrom method: a low-rank sketch of the Hessian.

    (Hataya and Yamada, "Nystrom method for accurate and scalable implicit differentiation", AISTATS 2023.) With
    random :math:`\Omega` of :math:`r` orthonormal columns and :math:`Y = H \Omega`,

    .. math:: H \approx \hat H = Y (\Omega^\top Y)^{+} Y^\top = U \Lambda U^\top
              \qquad p = (\hat H + \delta I)^{-1} v_0
              = U (\Lambda + \delta)^{-1} U^\top v_0 + \tfrac{1}{\delta} (I - U U^\top) v_0

    The products do not depend on each other, so there is nothing that could diverge; what the sketch does not see is
    divided by the damping. The paper draws columns of the identity for :math:`\Omega`; here they are Gaussian, which
    see all parameters, and :math:`\hat H` is brought to its eigenvectors, which is stable (Frangella, Tropp and Udell,
    "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 2023). Negative eigenvalues are set to zero: the
    sketch of an indefinite matrix says nothing reliable about them.

    Cost: ``rank + 1`` products and ``3 rank`` vectors of theta's size. The right one where the Hessian has few large
    eigenvalues and the rest does not matter.

    Args:
        rank: The number of columns of the sketch. Default: 10.
        damping: What is added to every eigenvalue; it must be positive. Default: the smallest eigenvalue that the
            sketch shows, as what it does not show should be smaller, and at least 1% of the largest one.
        seed: Seed of the sketch's own random numbers; each hypergradient draws others.
        product: How to get products with second derivatives. Default:
            :class:`~diopt_lightning.bilevel.DoubleBackward`.

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
        >>> gradient = Nystrom(rank=1, damping=1e-3)(problem).gradient
        >>> round(gradient[0].item(), 2)
        -3.0
    """

    def __init__(
        self, rank: int = 10, damping: float | None = None, seed: int = 0, product: Product | None = None
    ) -> None:
        super().__init__(product)
        require_at_least(1, rank=rank)
        if damping is not None and not damping > 0:
            raise ConfigurationError(f"`damping` of Nystrom must be positive, got {damping}: it is divided by.")
        self.rank = rank
        self.damping = damping
        self.seed = seed
        self._calls = 0

    def reset(self) -> None:
        """Draw the first sketch again; see :class:`HypergradientEstimator`."""
        super().reset()
        self._calls = 0

    #: The sketch is taken of whole vectors.
    supports_sharding = False

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Sketch, and invert the sketch; see :class:`ImplicitEstimator`."""
        right = flat(v0)
        sketch = self._draw(right)
        images = torch.stack([flat(linearization.hessian(unflat(column, v0))) for column in sketch.T], dim=1)
        vectors, values = eigenpairs(sketch, images)
        damping = self.damping or max(values.min().item(), 0.01 * values.max().item()) or 1.0
        coefficients = vectors.T @ right
        within = vectors @ (coefficients / (values + damping))
        outside = right - vectors @ coefficients
        outside = outside - vectors @ (vectors.T @ outside)  # again: what rounding left would be divided by the damping
        return Solution(unflat(within + outside / damping, v0), damping, {"damping": damping})

    def _draw(self, like: Tensor) -> Tensor:
        """Random orthonormal columns ``(parameters, rank)``, the same on all processes."""
        generator = torch.Generator(like.device).manual_seed(self.seed + self._calls)
        self._calls += 1
        columns = min(self.rank, like.numel())
        normal = torch.randn(like.numel(), columns, generator=generator, device=like.device)
        return orthonormal(normal.to(like.dtype))

    def advice(self, curvature: float, solution: Solution) -> str:
        """What to set; see :class:`ImplicitEstimator`."""
        return (
            f" It lies along a curvature of {curvature:.3g} that the sketch does not see: set `damping` to "
            f"{abs(curvature):.3g} or more (now {solution.damping:.3g}), or raise `rank` (now {self.rank})."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return how many sketches were drawn."""
        return super().state_dict() | {"calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._calls = state["calls"]


def eigenpairs(sketch: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvectors and eigenvalues of :math:`Y (\Omega^\top Y)^+ Y^\top`, those below zero set to it.

    Args:
        sketch: :math:`\Omega` ``(parameters, rank)``.
        images: :math:`Y = H \Omega` ``(parameters, rank)``.

    Returns:
        Orthonormal vectors ``(parameters, rank)`` and values ``(rank,)``.
    """
    core = sketch.T @ images
    basis = orthonormal(images)
    triangle = basis.T @ images
    inverse = torch.linalg.pinv((core + core.T) / 2, hermitian=True)
    values, rotation = torch.linalg.eigh(triangle @ inverse @ triangle.T)
    return basis @ rotation, values.clamp(min=0)


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the given ones ``(parameters, rank)``; zero where one lies in the span of others.

    Gram and Schmidt's way, twice for each column, after which they are orthogonal to rounding. LAPACK's factorization
    of so tall a matrix takes workspace of 16 columns more as soon as it has two threads.
    """
    basis = torch.zeros_like(columns)
    for index, column in enumerate(columns.T):
        before, rest = basis[:, :index], column
        for _ in range(2):
            rest = rest - before @ (before.T @ rest)
        independent = rest.norm() > 10 * torch.finfo(columns.dtype).eps * column.norm()
        basis[:, index] = torch.where(independent, rest / rest.norm(), 0.0)
    return basis


def flat(vector: Vector) -> Tensor:
    """Concatenate a vector's entries into one tensor ``(parameters,)``."""
    return torch.cat([entry.reshape(-1) for entry in vector])


def unflat(tensor: Tensor, like: Vector) -> Vector:
    """Undo :func:`flat`."""
    parts = torch.split(tensor, [entry.numel() for entry in like])
    return [part.view_as(entry).to(entry.dtype) for part, entry in zip(parts, like, strict=True)]
