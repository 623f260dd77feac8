"""The ends of the inner Hessian's spectrum, from which solvers take step sizes and damping."""

from typing import Any, NamedTuple

import torch

from diopt_lightning.bilevel.estimators.base import check_finite
from diopt_lightning.bilevel.products.base import Linearization
from diopt_lightning.bilevel.vectors import Vector, add, dot, norm, scale
from diopt_lightning.errors import ConfigurationError

# What a bound is raised by beyond the curvature that showed it to be too low.
MARGIN = 1.05


class Ritz(NamedTuple):
    """An eigenvalue as Lanczos iteration sees it.

    Args:
        value: The estimate.
        error: An eigenvalue is at most this far from it.
        share: That of its eigenvector in the square of the vector that the iteration started from.
    """

    value: float
    error: float
    share: float


def ritz_values(linearization: Linearization, start: Vector, products: int) -> list[Ritz]:
    r"""Estimate eigenvalues of the Hessian, at the ends of its spectrum first, by Lanczos iteration.

    The eigenvalues of the tridiagonal matrix that ``products`` steps make of :math:`H` lie inside of its spectrum and
    approach the ends of it first (Golub and Van Loan, "Matrix computations", chapter 10). The iteration is started at
    the right-hand side of the system rather than at a random vector: no random state is consumed, and the only
    eigenvectors that it cannot see are those that a solver working on this right-hand side cannot see either. Without
    reorthogonalization an extreme value may be found twice, which does no harm here.

    Args:
        linearization: The inner problem's second derivatives.
        start: A vector in the shapes of the inner parameters.
        products: The number of Hessian products to spend.

    Returns:
        The eigenvalues as far as seen, the lowest first; a zero where ``start`` is zero.
    """
    size = norm(start).item()
    if size == 0.0:
        return [Ritz(0.0, 0.0, 1.0)]
    diagonal: list[float] = []
    below: list[float] = []
    previous, vector = start, scale(start, 1 / size)
    for number in range(1, products + 1):
        image = linearization.hessian(vector)
        check_finite(image, f"product {number} of the spectrum's estimate with the inner loss's second derivatives")
        diagonal.append(dot(vector, image).item())
        image = add(image, vector, -diagonal[-1])
        if below:
            image = add(image, previous, -below[-1])
        size = norm(image).item()
        if size <= 1e-6 * max(map(abs, diagonal)):  # the space is exhausted
            size = 0.0
            break
        below.append(size)
        previous, vector = vector, scale(image, 1 / size)
    beside = torch.tensor(below[: len(diagonal) - 1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(tridiagonal + torch.diag(beside, 1) + torch.diag(beside, -1))
    errors, shares = size * vectors[-1].abs(), vectors[0].square()
    return [Ritz(*row) for row in torch.stack([values, errors, shares], dim=1).tolist()]


class Spectrum:
    r"""Bounds of the inner Hessian's spectrum, estimated now and then, and corrected when products prove them wrong.

    Args:
        products: Products spent on an estimate. Default: 8; where that is too low, later products show it.
        refresh_every: Hypergradients between two estimates. Default: 50, so that they cost less than one product in
            five.

    Attributes:
        lowest: The lowest eigenvalue seen.
        largest: The largest absolute eigenvalue seen, with a margin of 5%.
        ritz: All eigenvalues seen, the lowest first.

    Raises:
        ConfigurationError: If an argument is below 1.
    """

    def __init__(self, products: int = 8, refresh_every: int = 50) -> None:
        if products < 1 or refresh_every < 1:
            raise ConfigurationError(
                f"`products` and `refresh_every` of a Spectrum must be 1 or more, got {products} and {refresh_every}."
            )
        self.products = products
        self.refresh_every = refresh_every
        self.reset()

    def reset(self) -> None:
        """Forget the bounds."""
        self.lowest = 0.0
        self.largest = 0.0
        self.ritz: list[Ritz] = []
        self._age: int | None = None

    @property
    def due(self) -> bool:
        """Whether the next :meth:`refresh` will spend products."""
        return self._age is None or self._age >= self.refresh_every

    def refresh(self, linearization: Linearization, start: Vector) -> None:
        """Estimate the bounds if that is due, and count a hypergradient."""
        if self.due:
            self.ritz = ritz_values(linearization, start, self.products)
            self.lowest = self.ritz[0].value
            self.largest = MARGIN * max(abs(self.lowest), abs(self.ritz[-1].value))
            self._age = 0
        self.grow_older()

    def grow_older(self) -> None:
        """Count a hypergradient."""
        self._age = (self._age or 0) + 1

    def exceeded(self, vector: Vector, product: Vector, allowed: float = 1.0) -> bool:
        """Raise the upper bound if ``product = H vector`` is longer than ``allowed`` times what it permits.

        ``|H x| / |x|`` is never above the largest eigenvalue, and every product of a solver shows it for free. The
        curvature of a network that learns fast changes within few steps; an estimate that has aged is noticed here.
        """
        size = norm(vector).item()
        seen = norm(product).item() / size if size > 0 else 0.0
        if seen <= allowed * self.largest:
            return False
        self.largest = MARGIN * seen
        return True

    def expire(self) -> None:
        """Estimate anew at the next hypergradient."""
        self._age = None

    def statistics(self) -> dict[str, float]:
        """The largest eigenvalue as it was seen, without the margin; nothing before the first estimate."""
        return {} if self.largest == 0.0 else {"largest_eigenvalue": self.largest / MARGIN}

    def state_dict(self) -> dict[str, Any]:
        """Return the bounds and their age."""
        ritz = [list(each) for each in self.ritz]
        return {"lowest": self.lowest, "largest": self.largest, "age": self._age, "ritz": ritz}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.lowest, self.largest, age = state["lowest"], state["largest"], state["age"]
        self._age = None if age is None else int(age)
        self.ritz = [Ritz(*map(float, each)) for each in state.get("ritz", ())]  # which older checkpoints do not have
