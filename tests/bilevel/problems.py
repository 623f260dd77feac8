"""Problems whose hypergradients are known in closed form or from a dense solve, in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diopt_lightning.bilevel import BilevelProblem
from tests.tolerances import Error


def randn(*shape: int, seed: int) -> Tensor:
    """Normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(size: int, seed: int) -> Tensor:
    """A symmetric positive definite matrix."""
    root = randn(size, size, seed=seed)
    return root @ root.T / size + torch.eye(size, dtype=torch.float64)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Case:
    """A problem at its inner optimum, its hypergradient, and its derivatives as dense matrices.

    Attributes:
        problem: The problem.
        expected: The hypergradient, found without the estimator's mathematics where there is a closed form.
        v0: Gradient of the outer loss with respect to theta ``(n,)``.
        direct: Gradient of the outer loss with respect to phi ``(m,)``.
        hessian: ``(n, n)``.
        mixed: ``J^T`` as a matrix ``(m, n)``.
    """

    problem: BilevelProblem
    expected: Tensor

    def linearize(self) -> None:
        """Compute the dense derivatives, one row at a time."""
        theta, phi = list(self.problem.inner_parameters), list(self.problem.outer_parameters)
        outer = torch.autograd.grad(self.problem.outer_loss(), [*theta, *phi], allow_unused=True)
        outer = [torch.zeros_like(p) if g is None else g for g, p in zip(outer, [*theta, *phi], strict=True)]
        self.v0, self.direct = flat(outer[: len(theta)]), flat(outer[len(theta) :])
        gradient = flat(torch.autograd.grad(self.problem.inner_loss(), theta, create_graph=True))
        rows = [torch.autograd.grad(entry, [*theta, *phi], retain_graph=True, allow_unused=True) for entry in gradient]
        filled = [
            [torch.zeros_like(p) if g is None else g for g, p in zip(row, [*theta, *phi], strict=True)] for row in rows
        ]
        self.hessian = torch.stack([flat(row[: len(theta)]) for row in filled])
        self.mixed = torch.stack([flat(row[len(theta) :]) for row in filled], dim=1)

    def hypergradient(self, p: Tensor) -> Tensor:
        """The hypergradient with ``p`` for ``H^-1 v0``."""
        return self.direct - self.mixed @ p


class Quadratic(Case):
    """L_train = theta A theta / 2 - theta B phi, L_val = |theta - t|^2 / 2 + |phi|^2, theta* = A^-1 B phi."""

    def __init__(self) -> None:
        a, b, target = spd(6, seed=0), randn(6, 3, seed=1), randn(6, seed=2)
        phi = randn(3, seed=3).requires_grad_()
        optimum = torch.linalg.solve(a, b @ phi.detach())
        theta = optimum.clone().requires_grad_()
        self.problem = BilevelProblem(
            lambda: theta @ a @ theta / 2 - theta @ b @ phi,
            lambda: (theta - target).square().sum() / 2 + phi.square().sum(),
            [theta],
            [phi],
        )
        self.expected = b.T @ torch.linalg.solve(a, optimum - target) + 2 * phi.detach()
        self.linearize()


class RidgePenalty(Case):
    """Ridge regression with one learned log-penalty for each weight: theta* = (X^T X + diag(e^phi))^-1 X^T y."""

    def __init__(self) -> None:
        x, y = randn(20, 5, seed=0), randn(20, seed=1)
        x_val, y_val = randn(15, 5, seed=2), randn(15, seed=3)
        phi = randn(5, seed=4).requires_grad_()

        def optimum(phi: Tensor) -> Tensor:
            return torch.linalg.solve(x.T @ x + torch.diag(phi.exp()), x.T @ y)

        theta = optimum(phi).detach().requires_grad_()
        self.problem = BilevelProblem(
            lambda: F.mse_loss(x @ theta, y, reduction="sum") / 2 + (phi.exp() * theta.square()).sum() / 2,
            lambda: (x_val @ theta - y_val).square().sum() / 2,
            [theta],
            [phi],
        )
        # Differentiating through the closed-form solution knows nothing of implicit differentiation.
        (self.expected,) = torch.autograd.grad((x_val @ optimum(phi) - y_val).square().sum() / 2, phi)
        self.linearize()


class DataWeights(Case):
    """Ridge regression with a learned weight for each row, split over two tensors of inner parameters."""

    def __init__(self) -> None:
        x, y = randn(20, 5, seed=0), randn(20, seed=1)
        x_val, y_val = randn(15, 5, seed=2), randn(15, seed=3)
        phi = randn(20, seed=4).requires_grad_()

        def optimum(phi: Tensor) -> Tensor:
            weights = phi.sigmoid()
            return torch.linalg.solve(
                x.T @ (weights[:, None] * x) + 0.1 * torch.eye(5, dtype=x.dtype), x.T @ (weights * y)
            )

        first, second = (part.clone().requires_grad_() for part in optimum(phi).detach().split([2, 3]))

        def inner_loss() -> Tensor:
            theta = torch.cat([first, second])
            squares = F.mse_loss(x @ theta, y, reduction="none")
            return ((phi.sigmoid() * squares).sum() + 0.1 * theta.square().sum()) / 2

        self.problem = BilevelProblem(
            inner_loss,
            lambda: (x_val @ torch.cat([first, second]) - y_val).square().sum() / 2,
            [first, second],
            [phi],
        )
        (self.expected,) = torch.autograd.grad((x_val @ optimum(phi) - y_val).square().sum() / 2, phi)
        self.linearize()


class Network(Case):
    """A two-layer tanh network with a weight decay and a learned weight for each row, solved densely."""

    def __init__(self) -> None:
        x, y = randn(12, 3, seed=0), randn(12, 2, seed=1)
        x_val, y_val = randn(10, 3, seed=2), randn(10, 2, seed=3)
        phi = randn(12, seed=4).requires_grad_()
        first, second = (0.5 * randn(4, 3, seed=5)).requires_grad_(), (0.5 * randn(2, 4, seed=6)).requires_grad_()
        theta = [first, second]

        def inner_loss() -> Tensor:
            squares = F.mse_loss((x @ first.T).tanh() @ second.T, y, reduction="none").mean(1)
            return (phi.sigmoid() * squares).mean() + 0.05 * sum(p.square().sum() for p in theta)

        self.problem = BilevelProblem(
            inner_loss, lambda: ((x_val @ first.T).tanh() @ second.T - y_val).square().mean(), theta, [phi]
        )
        minimize(inner_loss, theta)
        self.linearize()
        self.expected = self.hypergradient(torch.linalg.solve(self.hessian, self.v0))


def minimize(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """Go to the minimum in place, to rounding."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward(inputs=parameters)
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    if flat(torch.autograd.grad(loss(), parameters)).norm() > 1e-7:
        raise RuntimeError("The test problem is not at its minimum.")


CASES = [Quadratic, RidgePenalty, DataWeights, Network]


def relative_error(found: Sequence[Tensor], expected: Tensor) -> Error:
    """Distance of a hypergradient to the expected one, relative to its norm."""
    return Error((flat(found) - expected).norm() / expected.norm())


def rounding_of_differences(
    problem: BilevelProblem, v: list[Tensor], products: Sequence[Sequence[Tensor]]
) -> list[float]:
    r"""How far apart two central differences may be that add in different orders, relative to what they are.

    A gradient comes from about 16 rounded operations one after the other (the product with the rows, tanh, the error,
    its square, its weight, their mean, and the derivative of each), so its relative error is at most 16 eps / 2. With
    those of two gradients, over twice the step, a difference is off by 16 (eps / 2) |g| / step, and two differences
    are by 16 eps |g| / step from each other: 1e-9 to 4e-8 of products as long as they are in the tests, as the step is
    4e-7. `test_rounding.py` says how much of that other orders take up.

    Args:
        problem: In float64.
        v: What the products are with.
        products: The one with the Hessian and the mixed one.

    Returns:
        A relative error for each product.
    """
    theta, eps = list(problem.inner_parameters), torch.finfo(torch.float64).eps
    gradients = torch.autograd.grad(problem.inner_loss(), [*theta, *problem.outer_parameters])
    step = eps ** (1 / 3) / 16 * (1 + flat(theta).norm()).sqrt() / flat(v).norm()  # that of `FiniteDifference`
    parts = gradients[: len(theta)], gradients[len(theta) :]
    return [
        (16 * eps * flat(g).norm() / step / flat(product).norm()).item()
        for g, product in zip(parts, products, strict=True)
    ]


def tied_network(dtype: torch.dtype = torch.float64) -> tuple[BilevelProblem, nn.Module, Tensor]:
    """A two-layer tanh network with tied weights and learned weights of its rows, far from its minimum."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator).to(dtype), torch.randn(8, 4, generator=generator).to(dtype)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)
    network[2].weight = network[0].weight
    phi = torch.zeros(8, dtype=dtype, requires_grad=True)
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    problem = BilevelProblem(
        lambda: (phi.sigmoid() * F.mse_loss(network(x), y, reduction="none").mean(1)).mean(),
        lambda: (network(y) - x).square().mean(),
        [*parameters, network[2].weight],
        [phi],
        inner_optimizer=optimizer,
    )
    return problem, network, phi
