"""The Neumann hypergradient in float64 against closed forms and its own definition."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from diopt_lightning.bilevel import BilevelProblem, ConvergenceWarning, Neumann
from diopt_lightning.bilevel.products import DoubleBackward
from diopt_lightning.bilevel.spectrum import largest_eigenvalue

pytestmark = pytest.mark.filterwarnings("error::diopt_lightning.bilevel.ConvergenceWarning")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(size: int, seed: int) -> Tensor:
    root = randn(size, size, seed=seed)
    return root @ root.T / size + torch.eye(size, dtype=torch.float64)


class Case:
    """A problem at its inner optimum, with its hypergradient in closed form."""

    problem: BilevelProblem
    expected: list[Tensor]
    hessian: Tensor


class Quadratic(Case):
    """L_train = theta A theta / 2 - theta B phi, L_val = |theta - t|^2 / 2 + |phi|^2, theta* = A^-1 B phi."""

    def __init__(self) -> None:
        a, b, target = spd(6, seed=0), randn(6, 3, seed=1), randn(6, seed=2)
        phi = randn(3, seed=3).requires_grad_()
        optimum = torch.linalg.solve(a, b @ phi.detach())
        theta = optimum.clone().requires_grad_()
        self.hessian = a
        self.problem = BilevelProblem(
            lambda: theta @ a @ theta / 2 - theta @ b @ phi,
            lambda: (theta - target).square().sum() / 2 + phi.square().sum(),
            [theta],
            [phi],
        )
        self.expected = [b.T @ torch.linalg.solve(a, optimum - target) + 2 * phi.detach()]


class RidgePenalty(Case):
    """Ridge regression with one learned log-penalty for each weight: theta* = (X^T X + diag(e^phi))^-1 X^T y."""

    def __init__(self) -> None:
        x, y = randn(20, 5, seed=0), randn(20, seed=1)
        x_val, y_val = randn(15, 5, seed=2), randn(15, seed=3)
        phi = randn(5, seed=4).requires_grad_()

        def optimum(phi: Tensor) -> Tensor:
            return torch.linalg.solve(x.T @ x + torch.diag(phi.exp()), x.T @ y)

        theta = optimum(phi).detach().requires_grad_()
        self.hessian = x.T @ x + torch.diag(phi.exp()).detach()
        self.problem = BilevelProblem(
            lambda: ((x @ theta - y).square().sum() + (phi.exp() * theta.square()).sum()) / 2,
            lambda: (x_val @ theta - y_val).square().sum() / 2,
            [theta],
            [phi],
        )
        # Differentiating through the closed-form solution knows nothing of implicit differentiation.
        self.expected = list(torch.autograd.grad((x_val @ optimum(phi) - y_val).square().sum() / 2, phi))


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
        self.hessian = (x.T @ (phi.sigmoid()[:, None] * x)).detach() + 0.1 * torch.eye(5, dtype=x.dtype)

        def inner_loss() -> Tensor:
            theta = torch.cat([first, second])
            return ((phi.sigmoid() * (x @ theta - y).square()).sum() + 0.1 * theta.square().sum()) / 2

        self.problem = BilevelProblem(
            inner_loss,
            lambda: (x_val @ torch.cat([first, second]) - y_val).square().sum() / 2,
            [first, second],
            [phi],
        )
        self.expected = list(torch.autograd.grad((x_val @ optimum(phi) - y_val).square().sum() / 2, phi))


CASES = [Quadratic, RidgePenalty, DataWeights]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    return (difference.norm() / torch.cat([b.flatten() for b in expected]).norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_converges_to_the_closed_form_with_its_default_step_size(case):
    case = case()
    estimate = Neumann(terms=3000)(case.problem)
    assert relative_error(estimate.gradient, case.expected) < 1e-6
    assert estimate.statistics["residual"] < 1e-6
    assert 0 < estimate.statistics["step_size"] < 2 / torch.linalg.eigvalsh(case.hessian).max().item()


@pytest.mark.parametrize("terms", [0, 1, 5])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_partial_sum(case, terms):
    case = case()
    problem, step_size = case.problem, 0.7 / torch.linalg.eigvalsh(case.hessian).max().item()
    theta, phi = list(problem.inner_parameters), list(problem.outer_parameters)
    outer = torch.autograd.grad(problem.outer_loss(), [*theta, *phi], allow_unused=True)
    v0 = torch.cat([g.flatten() for g in outer[: len(theta)]])
    factor = torch.eye(len(v0), dtype=v0.dtype) - step_size * case.hessian
    p = step_size * sum(torch.linalg.matrix_power(factor, m) @ v0 for m in range(terms + 1))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(problem.inner_loss(), theta, create_graph=True)])
    mixed = torch.autograd.grad(gradient @ p, phi)
    direct = [torch.zeros_like(f) if d is None else d for d, f in zip(outer[len(theta) :], phi, strict=True)]
    expected = [d - m for d, m in zip(direct, mixed, strict=True)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimate = Neumann(terms=terms, step_size=step_size)(problem)

    assert relative_error(estimate.gradient, expected) < 1e-10
    residual = (torch.linalg.matrix_power(factor, terms + 1) @ v0).norm() / v0.norm()
    assert estimate.statistics["residual"] == pytest.approx(residual.item(), rel=1e-8)
    assert estimate.statistics["products"] == terms + 1


def test_largest_eigenvalue_is_found_from_below():
    case = Quadratic()
    true = torch.linalg.eigvalsh(case.hessian).max().item()
    with DoubleBackward().linearize(case.problem) as linearization:
        few, many = (largest_eigenvalue(linearization, [randn(6, seed=5)], products) for products in (2, 200))
    assert few < many <= true * (1 + 1e-12)
    assert many == pytest.approx(true, rel=1e-6)


def test_too_large_a_step_turns_the_answer_around_and_is_warned_of_with_the_number_to_set():
    case = Quadratic()
    largest = torch.linalg.eigvalsh(case.hessian).max().item()
    with pytest.warns(ConvergenceWarning, match=r"set `step_size` to (\S+) or less") as caught:
        estimate = Neumann(terms=21, step_size=3 / largest)(case.problem)
    assert estimate.statistics["residual"] > 1
    assert torch.nn.functional.cosine_similarity(estimate.gradient[0], case.expected[0], dim=0) < 0
    suggested = float(str(caught[0].message).split("set `step_size` to ")[1].split()[0])
    assert suggested < 2 / largest
    assert relative_error(Neumann(terms=3000, step_size=suggested)(case.problem).gradient, case.expected) < 1e-6


def test_negative_curvature_is_warned_of_as_that():
    theta, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    curvature = torch.tensor([1.0, -1.0])
    problem = BilevelProblem(lambda: (curvature * theta**2).sum() / 2 - theta @ phi, theta.sum, [theta], [phi])
    with pytest.warns(ConvergenceWarning, match="negative curvature of -1"):
        Neumann(terms=5, step_size=0.5)(problem)


def test_warns_once_only():
    estimator = Neumann(terms=5, step_size=10.0)
    with pytest.warns(ConvergenceWarning):
        estimator(Quadratic().problem)
    estimator(Quadratic().problem)  # a second warning would be an error here


def test_the_estimate_of_the_eigenvalue_is_refreshed_on_schedule_and_survives_a_checkpoint():
    case = Quadratic()
    estimator = Neumann(power_iterations=4, refresh_every=3)
    products = [estimator(case.problem).statistics["products"] for _ in range(5)]
    assert products == [6, 2, 2, 6, 2]
    resumed = Neumann(power_iterations=4, refresh_every=3)
    resumed.load_state_dict(estimator.state_dict())
    assert [resumed(case.problem).statistics["products"] for _ in range(3)] == [2, 6, 2]


def test_an_estimate_of_the_eigenvalue_that_has_aged_is_corrected_before_the_series_diverges():
    case = Quadratic()
    estimator = Neumann(terms=3000)
    estimator.load_state_dict({"largest_eigenvalue": 1e-3, "calls": 1, "warned": False})
    estimate = estimator(case.problem)
    assert relative_error(estimate.gradient, case.expected) < 1e-6
    assert estimate.statistics["products"] > 3001  # what was begun with the old estimate counts


def network_problem(dtype: torch.dtype = torch.float64) -> tuple[BilevelProblem, nn.Module, Tensor]:
    """A two-layer tanh network with tied weights and learned weights of its rows."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 4, generator=generator).to(dtype), torch.randn(8, 4, generator=generator).to(dtype)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)
    network[2].weight = network[0].weight
    phi = torch.zeros(8, dtype=dtype, requires_grad=True)
    parameters = list(network.parameters())
    return (
        BilevelProblem(
            lambda: (phi.sigmoid() * (network(x) - y).square().mean(1)).mean(),
            lambda: (network(y) - x).square().mean(),
            [*parameters, network[2].weight],
            [phi],
        ),
        network,
        phi,
    )


def test_leaves_nothing_behind():
    problem, network, phi = network_problem()
    before = [p.detach().clone() for p in network.parameters()]
    random_state = torch.get_rng_state()
    Neumann(terms=3, step_size=0.1)(problem)
    assert all(p.grad is None for p in [*network.parameters(), phi])
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())


def test_tied_parameters_count_once():
    problem, network, _ = network_problem()
    assert len(problem.inner_parameters) == 3  # two biases and one shared weight
    estimate = Neumann(terms=2, step_size=0.1)(problem)
    untied = BilevelProblem(
        problem.inner_loss, problem.outer_loss, list(network.parameters()), list(problem.outer_parameters)
    )
    assert torch.equal(estimate.gradient[0], Neumann(terms=2, step_size=0.1)(untied).gradient[0])


def test_vectors_are_float32_where_parameters_are_bfloat16():
    estimate = Neumann(terms=1, step_size=0.1)(network_problem(torch.bfloat16)[0])
    exact = Neumann(terms=1, step_size=0.1)(network_problem(torch.float64)[0])
    assert estimate.gradient[0].dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(estimate.gradient[0].double(), exact.gradient[0], dim=0)
    assert cosine > 0.99


def test_an_outer_parameter_out_of_reach_gets_zeros():
    problem, _, phi = network_problem()
    unused = torch.ones(3, requires_grad=True)
    extended = BilevelProblem(problem.inner_loss, problem.outer_loss, problem.inner_parameters, [unused, phi])
    gradient = Neumann(terms=1, step_size=0.1)(extended).gradient
    assert torch.equal(gradient[0], torch.zeros(3))
    assert gradient[1].norm() > 0


def theta_phi() -> tuple[Tensor, Tensor]:
    return torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: {"inner_parameters": []}, "`inner_parameters` is empty"),
        (lambda t, p: {"outer_parameters": [torch.ones(2)]}, r"`outer_parameters\[0\]`.*does not require a gradient"),
        (lambda t, p: {"outer_parameters": [t]}, "both inner and outer"),
        (lambda t, p: {"inner_loss": lambda: t * p}, "`inner_loss` returned a tensor of shape"),
        (lambda t, p: {"inner_loss": lambda: (t * p).sum().detach()}, "without a gradient graph"),
        (lambda t, p: {"inner_loss": lambda: p.square().sum()}, "depends on none of the `inner_parameters`"),
        (lambda t, p: {"outer_loss": lambda: p.square().sum()}, "depends on none of the `inner_parameters`"),
        (lambda t, p: {"outer_loss": lambda: 1.0}, "expected a scalar tensor"),
    ],
)
def test_bad_problems_get_one_clear_error(change, message):
    theta, phi = theta_phi()
    arguments = {
        "inner_loss": lambda: (theta * phi).square().sum(),
        "outer_loss": lambda: theta.square().sum(),
        "inner_parameters": [theta],
        "outer_parameters": [phi],
    } | change(theta, phi)
    with pytest.raises(ValueError, match=message):
        Neumann()(BilevelProblem(**arguments))


def test_what_is_not_finite_is_reported_with_its_place():
    theta, phi = theta_phi()
    problem = BilevelProblem(lambda: (theta * phi).square().sum(), lambda: (theta * float("nan")).sum(), [theta], [phi])
    with pytest.raises(FloatingPointError, match="the gradient of the outer loss"):
        Neumann()(problem)


@pytest.mark.parametrize(
    "arguments", [{"terms": -1}, {"step_size": 0.0}, {"power_iterations": 0}, {"refresh_every": 0}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        Neumann(**arguments)
