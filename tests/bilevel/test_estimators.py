"""Every estimator: exact where it claims to be, and equal to its definition where it is cut short."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    Chebyshev,
    ConjugateGradient,
    DoubleBackward,
    GaussNewton,
    HypergradientEstimator,
    Identity,
    MinRes,
    NaturalHypergradient,
    Neumann,
    Nystrom,
    Penalty,
    Unrolled,
)
from diopt_lightning.bilevel.estimators.chebyshev import condition
from tests.bilevel.problems import CASES, Case, Quadratic, flat, randn, relative_error
from tests.estimators import Claim, claiming, exact_conjugate_gradient

pytestmark = pytest.mark.filterwarnings("error::diopt_lightning.bilevel.ConvergenceWarning")


def at_the_optimum(estimator: HypergradientEstimator, case: Case) -> Tensor:
    """The estimate, after gradient descent that stays where it is, for estimators that watch the inner steps."""
    problem = case.problem
    step_size = 1 / torch.linalg.eigvalsh(case.hessian).max().item()
    optimizer = torch.optim.SGD(problem.inner_parameters, lr=step_size)
    watched = BilevelProblem(
        problem.inner_loss,
        problem.outer_loss,
        problem.inner_parameters,
        problem.outer_parameters,
        inner_optimizer=optimizer,
    )
    for _ in range(estimator.recorded_steps):
        estimator.observe(watched)
    return flat(estimator(watched).gradient)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", claiming(Claim.EXACT))
def test_converges_to_the_closed_form(name, case):
    case, make = case(), claiming(Claim.EXACT)[name]
    # A forward difference is as exact as its first-order error allows.
    tolerance = 1e-5 if name == "neumann_exact_forward" else 1e-6
    assert relative_error([at_the_optimum(make(), case)], case.expected) < tolerance


def test_gauss_newton_is_exact_where_the_model_is_linear():
    for case in (CASES[1](), CASES[2]()):
        estimate = exact_conjugate_gradient(GaussNewton())(case.problem)
        assert relative_error(estimate.gradient, case.expected) < 1e-10


def krylov_basis(matrix: Tensor, start: Tensor, dimension: int) -> Tensor:
    """Orthonormal basis of the span of start, A start, ... ``(n, dimension)``."""
    columns = [start / start.norm()]
    for _ in range(dimension - 1):
        image = matrix @ columns[-1]
        for _ in range(2):
            for column in columns:
                image = image - (column @ image) * column
        columns.append(image / image.norm())
    return torch.stack(columns, dim=1)


def neumann_sum(case: Case, estimator: Neumann) -> Tensor:
    factor = torch.eye(len(case.v0), dtype=case.v0.dtype) - estimator.step_size * case.hessian
    return estimator.step_size * sum(torch.linalg.matrix_power(factor, m) @ case.v0 for m in range(estimator.terms + 1))


def chebyshev_polynomial(case: Case, estimator: Chebyshev) -> Tensor:
    upper = estimator.spectrum.largest + estimator.damping
    lower = estimator.lower_end(estimator.products, upper, estimator.damping)
    values, vectors = torch.linalg.eigh(case.hessian)
    values = values + estimator.damping

    def polynomial(x: Tensor) -> Tensor:  # T_M from its recurrence
        before, current = torch.ones_like(x), x
        for _ in range(estimator.products - 1):
            before, current = current, 2 * x * current - before
        return current

    argument = (upper + lower - 2 * values) / (upper - lower)
    at_zero = torch.tensor((upper + lower) / (upper - lower), dtype=values.dtype)
    residual = polynomial(argument) / polynomial(at_zero)
    return vectors @ ((1 - residual) / values * (vectors.T @ case.v0))


def galerkin(case: Case, estimator: ConjugateGradient) -> Tensor:
    matrix = case.hessian + estimator.damping * torch.eye(len(case.v0), dtype=case.v0.dtype)
    basis = krylov_basis(matrix, case.v0, estimator.products - 1)
    return basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ case.v0)


def least_residual(case: Case, estimator: MinRes) -> Tensor:
    matrix = case.hessian + estimator.damping * torch.eye(len(case.v0), dtype=case.v0.dtype)
    basis = krylov_basis(matrix, case.v0, estimator.products - 1)
    return basis @ torch.linalg.lstsq(matrix @ basis, case.v0[:, None]).solution[:, 0]


def sketched_inverse(case: Case, estimator: Nystrom) -> Tensor:
    normal = torch.randn(len(case.v0), estimator.rank, generator=torch.Generator().manual_seed(estimator.seed))
    sketch = torch.linalg.qr(normal.double()).Q
    images = case.hessian @ sketch
    approximation = images @ torch.linalg.inv(sketch.T @ images) @ images.T
    return torch.linalg.solve(approximation + estimator.damping * torch.eye(len(case.v0)).double(), case.v0)


DEFINITIONS: list[tuple[str, HypergradientEstimator, Callable[[Case, HypergradientEstimator], Tensor]]] = [
    *((f"neumann-{terms}", Neumann(terms, step_size=0.02), neumann_sum) for terms in (0, 1, 5)),
    *((f"chebyshev-{m}", Chebyshev(m, damping=0.3), chebyshev_polynomial) for m in (1, 2, 5)),
    *((f"conjugate-gradient-{m}", ConjugateGradient(m, damping=0.3), galerkin) for m in (2, 4)),
    *((f"minres-{m}", MinRes(m, damping=0.3), least_residual) for m in (2, 4)),
    ("nystrom-3", Nystrom(rank=3, damping=0.3), sketched_inverse),
    ("identity", Identity(step_size=0.3), lambda case, estimator: 0.3 * case.v0),
]


@pytest.mark.filterwarnings("default::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "estimator", "definition"), DEFINITIONS, ids=[row[0] for row in DEFINITIONS])
def test_equals_its_definition(name, estimator, definition, case):
    case = case()
    if isinstance(estimator, (Neumann, Chebyshev, ConjugateGradient, MinRes)):
        estimator.spectrum.expire()
    if isinstance(estimator, Nystrom):
        estimator.load_state_dict({"warned": True, "calls": 0})
    estimate = estimator(case.problem)
    p = definition(case, estimator)
    assert relative_error(estimate.gradient, case.hypergradient(p)) < 1e-10
    residual = case.v0 - case.hessian @ p
    if estimator.scale_free:
        image = case.hessian @ p
        residual = case.v0 - (case.v0 @ image) / (image @ image) * image
    assert estimate.statistics["residual"] == pytest.approx((residual.norm() / case.v0.norm()).item(), rel=1e-8)


def test_the_low_rank_and_the_diagonal_fisher_equal_their_dense_forms():
    case = Quadratic()
    theta = case.problem.inner_parameters[0]
    gradients = [randn(6, seed=10 + i) for i in range(4)]
    low_rank, diagonal = NaturalHypergradient(rank=3, damping=0.2), NaturalHypergradient(decay=0.9, damping=0.2)
    for gradient in gradients:
        theta.grad = gradient
        low_rank.observe(case.problem)
        diagonal.observe(case.problem)
    theta.grad = None
    last = torch.stack(gradients[1:], dim=1)
    fisher = last @ last.T / 3
    mean = sum(0.1 * 0.9 ** (3 - i) * g.square() for i, g in enumerate(gradients)) / (1 - 0.9**4)
    for estimator, matrix in ((low_rank, fisher), (diagonal, torch.diag(mean))):
        p = torch.linalg.solve(matrix + 0.2 * torch.eye(6, dtype=matrix.dtype), case.v0)
        assert relative_error(estimator(case.problem).gradient, case.hypergradient(p)) < 1e-10


def test_sama_is_the_derivative_of_adams_next_step():
    case = Quadratic()
    theta = case.problem.inner_parameters[0]
    problem = BilevelProblem(
        case.problem.inner_loss,
        case.problem.outer_loss,
        [theta],
        case.problem.outer_parameters,
        inner_optimizer=torch.optim.Adam([theta], lr=0.1, betas=(0.8, 0.9), eps=1e-4),
    )
    for seed in range(3):
        theta.grad = randn(6, seed=seed)
        problem.inner_optimizer.step()
    theta.grad = None
    state = problem.inner_optimizer.state[theta]
    g = torch.autograd.grad(problem.inner_loss(), theta)[0]
    # m / (sqrt(v) + eps) differentiated by hand, at the fourth step.
    m = (0.8 * state["exp_avg"] + 0.2 * g) / (1 - 0.8**4)
    v = (0.9 * state["exp_avg_sq"] + 0.1 * g.square()) / (1 - 0.9**4)
    first, second = 0.2 / (1 - 0.8**4), 2 * 0.1 * g / (1 - 0.9**4)
    derivative = 0.1 * (first / (v.sqrt() + 1e-4) - m * second / (2 * v.sqrt() * (v.sqrt() + 1e-4) ** 2))
    outer = torch.autograd.grad(problem.outer_loss(), [theta, *problem.outer_parameters])
    expected = outer[1] - case.mixed @ (derivative * outer[0])
    assert relative_error(SAMA(product=DoubleBackward())(problem).gradient, expected) < 1e-10
    assert relative_error(SAMA()(problem).gradient, expected) < 1e-8


def sgd(theta, state, g, step):
    """Nesterov's momentum with weight decay, as torch.optim.SGD has it."""
    g = g + 0.1 * theta
    momentum = g if step == 0 else 0.9 * state[0] + g
    return theta - 0.05 * (g + 0.9 * momentum), (momentum,)


def adamw(theta, state, g, step):
    """Adam with decoupled weight decay, as torch.optim.AdamW has it."""
    m, v = state or (torch.zeros_like(g), torch.zeros_like(g))
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square()
    moments = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
    return theta - 0.05 * 0.1 * theta - 0.05 * moments[0] / (moments[1].sqrt() + 1e-8), (m, v)


OPTIMIZERS = [
    (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1), sgd),
    (lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1), adamw),
]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("make", "update"), OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("before", [0, 2])
def test_unrolled_equals_autograd_through_the_loop_written_by_hand(make, update, clip, before):
    x, y = randn(9, 4, seed=0), randn(9, seed=1)
    start, phi = randn(4, seed=2), randn(9, seed=3).requires_grad_()

    def inner_loss(theta: Tensor) -> Tensor:
        return (phi.sigmoid() * ((x @ theta).tanh() - y).square()).sum()

    def outer_loss(theta: Tensor) -> Tensor:
        return (theta - 1).square().sum() + phi.square().sum()

    theta, state, steps = start, (), 5
    for step in range(steps):
        if step == before:  # what came earlier is a constant of the last steps
            theta, state = theta.detach().requires_grad_(), tuple(entry.detach() for entry in state)
        theta = theta if theta.requires_grad else theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(inner_loss(theta), theta, create_graph=True)
        if clip is not None:
            g = g * (clip / (g.norm() + 1e-6)).clamp(max=1.0)
        theta, state = update(theta, state, g, step)
    (expected,) = torch.autograd.grad(outer_loss(theta), phi)

    parameter = start.clone().requires_grad_()
    problem = BilevelProblem(
        lambda: inner_loss(parameter),
        lambda: outer_loss(parameter),
        [parameter],
        [phi],
        inner_optimizer=make([parameter]),
        inner_gradient_clip=clip,
    )
    estimator = Unrolled(steps=steps - before)
    for _ in range(steps):
        problem.inner_optimizer.zero_grad()
        problem.inner_loss().backward(inputs=[parameter])
        estimator.observe(problem)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        problem.inner_optimizer.step()
    assert torch.allclose(parameter, theta.detach(), rtol=1e-12)
    now = parameter.detach().clone()
    assert relative_error(estimator(problem).gradient, expected) < 1e-10
    assert torch.equal(parameter, now)


def test_a_gradient_of_zero_does_not_stop_the_derivative_of_adam():
    theta, phi = torch.ones(2).double().requires_grad_(), torch.ones(1).double().requires_grad_()
    problem = BilevelProblem(
        lambda: (theta[0] * phi).sum(),  # theta[1] is not used: its moments are zero
        lambda: theta.square().sum(),
        [theta],
        [phi],
        inner_optimizer=torch.optim.Adam([theta], lr=0.1),
    )
    assert SAMA(product=DoubleBackward())(problem).gradient[0].isfinite().all()


def test_penalty_equals_its_recursion():
    case = Quadratic()
    alpha, step_size, steps = 50.0, 0.1, 7
    offset = torch.zeros_like(case.v0)
    for _ in range(steps):  # L_val is |theta - t|^2 / 2, so its gradient grows by the offset
        offset = offset - step_size * (case.hessian @ offset + (case.v0 + offset) / alpha)
    expected = case.direct + alpha * case.mixed @ offset
    estimate = Penalty(steps, multiplier=alpha, step_size=step_size)(case.problem)
    assert relative_error(estimate.gradient, expected) < 1e-10


def test_the_interval_of_chebyshev_leaves_the_residual_that_was_asked_for():
    for products, accuracy in ((1, 0.1), (5, 0.1), (20, 0.01)):
        ratio = condition(products, accuracy)
        argument = (ratio + 1) / (ratio - 1)
        assert math.cosh(products * math.acosh(argument)) == pytest.approx(1 / accuracy)


def with_spectrum(values: Tensor, seed: int) -> Case:
    """A quadratic inner loss with the given curvatures."""
    case, outer = Case(), randn(len(values), seed=seed)
    theta, phi = (torch.zeros_like(values).requires_grad_() for _ in range(2))
    case.problem = BilevelProblem(
        lambda: (values * theta**2).sum() / 2 - theta @ phi, lambda: outer @ theta, [theta], [phi]
    )
    case.expected = outer / values
    return case


SPECTRA = {
    "few": lambda: torch.tensor([0.1, 0.15, 0.6, 0.9, 1.0]).double(),
    "flat": lambda: torch.linspace(0.05, 1.0, 100).double(),
    "steep": lambda: torch.logspace(-4, 0, 100).double(),
    "outliers": lambda: torch.cat([torch.linspace(0.01, 0.03, 98), torch.tensor([0.7, 1.0])]).double(),
}


@pytest.mark.parametrize("case", [*CASES, *SPECTRA])
def test_more_products_of_chebyshev_are_never_worse_than_fewer_or_than_a_series(case):
    case = with_spectrum(SPECTRA[case](), seed=1) if case in SPECTRA else case()
    before = float("inf")
    for products in (1, 2, 3, 5, 8, 12, 20, 30):
        found, series, default = (
            relative_error(estimator(case.problem).gradient, case.expected)
            for estimator in (Chebyshev(products), Neumann(products - 1), Chebyshev(products, accuracy=0.5 / products))
        )
        assert found < max(float(series), 1e-9)
        assert found < max(before, 1e-9)
        assert found < max(1.05 * float(default), 0.6)  # of two products one may be lucky
        before = float(found)


def test_what_is_known_of_the_spectrum_shortens_the_interval_of_chebyshev_and_survives_a_checkpoint():
    case, estimator, resumed = Quadratic(), Chebyshev(20), Chebyshev(20)
    estimator(case.problem)
    upper = estimator.spectrum.largest
    assert estimator.lower_end(20, upper, 0.0) > 10 * resumed.lower_end(20, upper, 0.0)
    resumed.load_state_dict(estimator.state_dict())
    assert resumed.lower_end(20, upper, 0.0) == estimator.lower_end(20, upper, 0.0)
    older = estimator.state_dict()
    del older["spectrum"]["ritz"]
    resumed.load_state_dict(older)
    assert resumed.lower_end(20, upper, 0.0) == Chebyshev(20).lower_end(20, upper, 0.0)
