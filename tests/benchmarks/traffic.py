"""What processes exchange for one outer step, by estimator: ``python -m tests.benchmarks.traffic``.

Every vector that is averaged over processes is counted, in units of the inner parameters theta and of the outer ones
phi. A vector is exchanged in float32 at least. The first outer step is told from later ones, because some estimators
find the spectrum of the Hessian in the first of every 50.
"""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    Chebyshev,
    ConjugateGradient,
    FiniteDifference,
    HypergradientEstimator,
    Identity,
    MinRes,
    NaturalHypergradient,
    Neumann,
    Nystrom,
    Penalty,
    Unrolled,
)
from diopt_lightning.bilevel.vectors import Vector

ESTIMATORS: dict[str, Callable[[], HypergradientEstimator]] = {
    "`Chebyshev()`": Chebyshev,
    "`Chebyshev(product=FiniteDifference())`": lambda: Chebyshev(product=FiniteDifference(check=False)),
    "`ConjugateGradient()`": ConjugateGradient,
    "`MinRes()`": MinRes,
    "`Neumann(terms=1)`": lambda: Neumann(terms=1),
    "`Nystrom()`": Nystrom,
    "`Unrolled(steps=2)`": lambda: Unrolled(steps=2),
    "`Penalty()`": Penalty,
    "`NaturalHypergradient()`": NaturalHypergradient,
    "`SAMA()`": SAMA,
    "`Identity()`": Identity,
}


class Counter:
    """Counts what is averaged."""

    def __init__(self, theta: int, phi: int) -> None:
        self.sizes = {"theta": theta, "phi": phi}
        self.values = 0

    def __call__(self, vector: Vector) -> Vector:
        """Count a vector and return it, as on one process."""
        self.values += sum(tensor.numel() for tensor in vector)
        return vector

    def take(self) -> tuple[int, int]:
        """How many vectors of each size were counted since the last time."""
        # Theta is much larger than all that is exchanged of phi.
        thetas, rest = divmod(self.values, self.sizes["theta"])
        self.values = 0
        return thetas, rest // self.sizes["phi"]


def exchanged(estimator: HypergradientEstimator, steps: int = 3) -> list[tuple[int, int]]:
    """Vectors of theta's and of phi's size that each of the first outer steps exchanges."""
    torch.manual_seed(0)
    model, phi = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)), nn.Parameter(torch.zeros(4))
    x, y, index = torch.randn(2, 32, 16), torch.randn(2, 32, 1), torch.arange(32) % 4
    theta = list(model.parameters())
    counter = Counter(sum(parameter.numel() for parameter in theta), phi.numel())
    optimizer = torch.optim.Adam(theta, lr=1e-3)

    def inner_loss() -> torch.Tensor:
        return (phi[index].exp() * (model(x[0]) - y[0]).square().squeeze(1)).mean()

    problem = BilevelProblem(
        inner_loss, lambda: F.mse_loss(model(x[1]), y[1]), theta, [phi], average=counter, inner_optimizer=optimizer
    )
    found = []
    for _ in range(steps):
        for _ in range(2):
            optimizer.zero_grad()
            inner_loss().backward()
            phi.grad = None
            estimator.observe(problem)
            optimizer.step()
        counter.take()
        estimator(problem)
        found.append(counter.take())
    return found


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")  # an answer that is no good is exchanged like one that is
    print("| estimator | first outer step: theta | phi | later ones: theta | phi |")
    print("| --- | --- | --- | --- | --- |")
    for name, make in ESTIMATORS.items():
        first, *_, later = exchanged(make())
        print(f"| {name} | {first[0]} | {first[1]} | {later[0]} | {later[1]} |")


if __name__ == "__main__":
    main()
