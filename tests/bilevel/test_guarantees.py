"""What every estimator guarantees: nothing left behind, tied parameters once, zeros for what is out of reach.

``CHECKS`` are the tests of that. Each takes a function that makes the estimator, so that others can be given to them.
"""

import gc
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    FiniteDifference,
    Hypergradient,
    HypergradientEstimator,
    ImplicitEstimator,
    Linearization,
    MicroBatches,
    NaturalHypergradient,
    Product,
    Solution,
    Unrolled,
)
from diopt_lightning.bilevel.vectors import Vector
from diopt_lightning.errors import ConfigurationError
from tests.bilevel.problems import flat, randn, tied_network
from tests.estimators import ESTIMATORS, PRODUCTS, Claim, Make, claiming, exported
from tests.tolerances import Error

pytestmark = pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")

CHECKS: list[Callable[[Make], None]] = []


def every_estimator(check: Callable[[Make], None]) -> Callable[[Make], None]:
    """Let a test run for all estimators, and for those of other files."""
    CHECKS.append(check)
    settings = claiming(Claim.GUARANTEES)
    return pytest.mark.parametrize("make", settings.values(), ids=settings)(check)


def test_every_exported_estimator_and_product_has_its_rows():
    for estimator in exported(HypergradientEstimator):
        claims = [row.claims for row in ESTIMATORS if type(row.make()) is estimator]
        missing = [claim.name for claim in Claim.COMMON if not any(claim in each for each in claims)]
        if estimator.supports_sharding is not False and not any(Claim.SHARDED in each for each in claims):
            missing.append(Claim.SHARDED.name)
        assert not missing, f"ESTIMATORS of tests/estimators.py has no row of {estimator.__name__} for {missing}"
    tested = {type(row.make()) for row in PRODUCTS}
    assert tested == set(exported(Product)), "PRODUCTS of tests/estimators.py are not those that are exported"


def step(estimator: HypergradientEstimator, problem: BilevelProblem) -> None:
    """Take an inner step as a training loop does."""
    losses = problem.inner_parts()
    for loss, weight in losses:
        (weight * loss()).backward(inputs=list(problem.inner_parameters))
    estimator.observe(problem)
    problem.inner_optimizer.step()
    problem.inner_optimizer.zero_grad()


@every_estimator
def test_leaves_nothing_behind(make):
    problem, network, phi = tied_network()
    estimator = make()
    step(estimator, problem)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in network.parameters()]
    random_state, state = torch.get_rng_state(), problem.inner_optimizer.state_dict()["state"]
    moments = [entry["exp_avg"].clone() for entry in state.values()]
    estimator(problem)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in network.parameters())
    assert phi.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(a, entry["exp_avg"]) for a, entry in zip(moments, state.values(), strict=True))


@every_estimator
def test_tied_parameters_count_once(make):
    problem, network, _ = tied_network()
    assert len(problem.inner_parameters) == 3  # two biases and one shared weight
    listed_once = replace(problem, inner_parameters=list(network.parameters()))
    gradients = []
    for each in (problem, listed_once):
        estimator = make()
        observe_ones(estimator, each)
        gradients.append(estimator(each).gradient[0])
    assert torch.equal(*gradients)


@every_estimator
def test_an_outer_parameter_out_of_reach_gets_zeros(make):
    problem, _, phi = tied_network()
    unused = torch.ones(3, requires_grad=True)
    extended = replace(problem, outer_parameters=[unused, phi])
    estimator = make()
    step(estimator, extended)
    gradient = estimator(extended).gradient
    assert torch.equal(gradient[0], torch.zeros(3))
    assert gradient[1].norm() > 0


@every_estimator
def test_the_direct_term_is_included(make):
    problem, _, phi = tied_network()
    offset = randn(8, seed=3)
    direct = replace(problem, outer_loss=lambda: problem.outer_loss() + offset @ phi)
    gradients = []
    for each in (problem, direct):
        estimator = make()
        observe_ones(estimator, each)
        gradients.append(estimator(each).gradient[0])
    assert torch.allclose(gradients[1] - gradients[0], offset, atol=1e-9)


def observe_ones(estimator: HypergradientEstimator, problem: BilevelProblem) -> None:
    """Let an estimator that reads `.grad` see something."""
    for parameter in problem.inner_parameters:
        parameter.grad = torch.ones_like(parameter)
    estimator.observe(problem)
    for parameter in problem.inner_parameters:
        parameter.grad = None


@every_estimator
def test_gradients_that_share_memory_are_not_changed_in_place(make):
    """The gradient of a + b is one tensor for both; changing it for one would change it for the other."""

    def gradient(outer_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        a, b = randn(4, seed=0).requires_grad_(), randn(4, seed=1).requires_grad_()
        phi = randn(4, seed=2).requires_grad_()
        problem = BilevelProblem(
            lambda: (phi.exp() * (a**2 + 2 * b**2)).sum() + (a - b).tanh() @ phi,
            lambda: outer_loss(a, b),
            [a, b],
            [phi],
            inner_optimizer=torch.optim.Adam([a, b], lr=0.1),
        )
        estimator = make()
        step(estimator, problem)
        return estimator(problem).gradient[0]

    assert torch.allclose(gradient(lambda a, b: (a + b).sum()), gradient(lambda a, b: a.sum() + b.sum() * 1.0))


@every_estimator
def test_vectors_are_float32_where_parameters_are_bfloat16(make):
    exact, _, _ = tied_network(torch.float64)
    problem, _, _ = tied_network(torch.bfloat16)
    estimates = []
    for each in (exact, problem):
        estimator = make()
        step(estimator, each)
        if estimator.supports_sharding and each is problem:  # it takes differences of first derivatives
            with pytest.raises(ConfigurationError, match=r"less than torch\.bfloat16 can hold"):
                estimator(each)
            return
        estimates.append(estimator(each).gradient[0])
    assert estimates[1].dtype == torch.float32
    assert Error(1 - torch.nn.functional.cosine_similarity(estimates[1].double(), estimates[0], dim=0)) < 0.03


@every_estimator
def test_losses_are_computed_in_autocast_and_nothing_else(make):
    def problem() -> tuple[BilevelProblem, list[bool]]:
        a, b = (randn(4, seed=seed).float().requires_grad_() for seed in (0, 1))
        phi, cast = randn(4, seed=2).float().requires_grad_(), []

        def inner_loss() -> Tensor:  # autocast has nothing to cast in it
            cast.append(torch.is_autocast_enabled("cpu"))
            return (phi.exp() * (a**2 + 2 * b**2)).sum() + ((a - b).tanh() * phi).sum()

        return BilevelProblem(
            inner_loss, lambda: a.sum() + b.sum(), [a, b], [phi], inner_optimizer=torch.optim.Adam([a, b], lr=0.1)
        ), cast

    found = []
    for enabled in (False, True):
        each, cast = problem()
        estimator = make()
        observe_ones(estimator, each)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            if enabled and estimator.supports_sharding:  # it takes differences of first derivatives
                with pytest.raises(ConfigurationError, match=r"computes in torch\.bfloat16 is rounding error"):
                    estimator(each)
                return
            found.append(estimator(each).gradient[0])
        assert cast
        assert set(cast) == {enabled}
    assert torch.equal(*found)


@every_estimator
def test_casts_of_parameters_are_those_of_their_present_values(make):
    found = []
    for before in (False, True):
        problem, network, _ = tied_network(torch.float32)
        estimator = make()
        if estimator.supports_sharding:
            return
        with torch.autocast("cpu", torch.bfloat16):
            if before:
                problem.inner_loss()  # which keeps casts of the weights until autocast ends
            for parameter in network.parameters():
                parameter.data += 0.5
            observe_ones(estimator, problem)
            found.append(estimator(problem).gradient[0])
    assert torch.equal(*found)


@every_estimator
def test_micro_batches_give_what_the_whole_batch_gives(make):
    problem, _, _ = tied_network()
    halves = MicroBatches([problem.inner_loss, problem.inner_loss], [1, 3])
    gradients = []
    for each in (problem, replace(problem, inner_loss=halves)):
        estimator = make()
        step(estimator, each)
        for parameter, value in zip(each.inner_parameters, tied_network()[0].inner_parameters, strict=True):
            parameter.data.copy_(value)
        gradients.append(estimator(each).gradient[0])
        problem.inner_optimizer.state.clear()
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-12)


@every_estimator
def test_a_resumed_estimator_goes_on_bitwise(make):
    def run(estimator: HypergradientEstimator, steps: range) -> list[Tensor]:
        found = []
        for number in steps:
            torch.manual_seed(number)
            problem, _, phi = tied_network()
            phi.data.normal_()
            for _ in range(max(2, estimator.recorded_steps)):  # what is on record is not part of the state
                observe_ones(estimator, problem)
            found.append(estimator(problem).gradient[0])
        return found

    whole, first, second = make(), make(), make()
    expected = run(whole, range(4))
    run(first, range(2))
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(expected[2:], run(second, range(2, 4)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("make", claiming(Claim.GUARANTEES).values(), ids=claiming(Claim.GUARANTEES))
def test_memory_stays_flat_over_a_thousand_calls(make):
    theta, phi = torch.randn(20_000).requires_grad_(), torch.randn(20_000).requires_grad_()
    optimizer = torch.optim.Adam([theta])
    problem = BilevelProblem(
        lambda: (theta.square() / 2 + 0.1 * (theta * phi).tanh()).sum(),
        lambda: (theta - 1).square().sum(),
        [theta],
        [phi],
        inner_optimizer=optimizer,
    )
    estimator = make()

    def call(times: int) -> tuple[int, int]:
        for _ in range(times):
            observe_ones(estimator, problem)
            estimator(problem)
        gc.collect()
        # Not `isinstance`, which looks into objects that warn of being looked at.
        tensors = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tensors

    peak, tensors = call(50)
    later_peak, later_tensors = call(1000)
    # One vector kept by each call would be 80 MB, and a thousand tensors.
    assert later_peak - peak < 20_000  # KiB
    assert later_tensors - tensors < 20


def estimate(estimator: HypergradientEstimator, arguments: dict[str, Any]) -> Hypergradient:
    problem = BilevelProblem(**arguments)
    observe_ones(estimator, problem)
    return estimator(problem)


def theta_phi() -> tuple[Tensor, Tensor]:
    return torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)


BAD_PROBLEMS: list[tuple[Callable[[Tensor, Tensor], dict[str, Any]], str]] = [
    (lambda t, p: {"inner_parameters": []}, "`inner_parameters` is empty"),
    (lambda t, p: {"outer_parameters": [torch.ones(2)]}, r"`outer_parameters\[0\]`.*does not require a gradient"),
    (lambda t, p: {"outer_parameters": [t]}, "both inner and outer"),
    (lambda t, p: {"inner_loss": lambda: t * p}, "`inner_loss` returned a tensor of shape"),
    (lambda t, p: {"inner_loss": lambda: (t * p).sum().detach()}, "without a gradient graph"),
    (lambda t, p: {"inner_loss": lambda: p.square().sum()}, "depends on none of the `inner_parameters`"),
    (lambda t, p: {"outer_loss": lambda: p.square().sum()}, "depends on none of the `inner_parameters`"),
    (lambda t, p: {"outer_loss": lambda: 1.0}, "expected a scalar tensor"),
]


@every_estimator
def test_bad_problems_get_one_clear_error(make):
    for change, message in BAD_PROBLEMS:
        theta, phi = theta_phi()
        arguments = {
            "inner_loss": lambda t=theta, p=phi: (t * p).square().sum(),
            "outer_loss": lambda t=theta: t.square().sum(),
            "inner_parameters": [theta],
            "outer_parameters": [phi],
            "inner_optimizer": torch.optim.Adam([theta]),
        } | change(theta, phi)
        with pytest.raises(ValueError, match=message):
            estimate(make(), arguments)


@every_estimator
def test_what_is_not_finite_is_reported_with_its_place(make):
    theta, phi = theta_phi()
    optimizer = torch.optim.Adam([theta])
    problem = BilevelProblem(
        lambda: (theta * phi).square().sum(),
        lambda: (theta * float("nan")).sum(),
        [theta],
        [phi],
        inner_optimizer=optimizer,
    )
    estimator = make()
    observe_ones(estimator, problem)
    with pytest.raises(FloatingPointError, match="the gradient of the outer loss"):
        estimator(problem)
    # The square root has an infinite derivative at 0.
    inner = replace(problem, outer_loss=lambda: theta.sum(), inner_loss=lambda: (theta - 1).abs().sqrt() @ phi)
    estimator = make()
    observe_ones(estimator, inner)
    places = r"product 1 of .* second derivatives|gradient of the inner loss|inner step 1 from the last"
    with pytest.raises(FloatingPointError, match=places):
        estimator(inner)


class Curious(ImplicitEstimator):
    """A new solver, which looks at all that a linearization promises."""

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        weights = [weight for _, weight in linearization.parts]
        losses = torch.stack([weight * linearization.evaluate(i).detach() for i, weight in enumerate(weights)])
        assert torch.equal(linearization.inner_loss, losses.sum())
        assert len(linearization.curvature_weights) == 1  # of the half of the micro-batches that the product takes
        expected = torch.autograd.grad(self.loss(linearization.problem), linearization.problem.inner_parameters)
        torch.testing.assert_close(linearization.gradient(), list(expected))
        p = linearization.hessian(v0)
        curvature, mixed = linearization.both(v0)
        assert torch.equal(flat(curvature), flat(p))
        assert flat(mixed).norm() > 0
        linearization.statistics["seen"] = 1.0
        return Solution(p, statistics={"loss": linearization.inner_loss.item(), **linearization.statistics})

    def loss(self, problem: BilevelProblem) -> Tensor:
        return sum(weight * part() for part, weight in problem.inner_parts())


@pytest.mark.parametrize("row", PRODUCTS, ids=lambda row: row.name)
def test_a_new_solver_has_all_that_a_linearization_promises(row):
    problem, _, _ = tied_network()
    problem = replace(problem, inner_loss=MicroBatches([problem.inner_loss, problem.inner_loss], [1, 3]))
    product = row.make()
    product.fraction = 0.5
    found = Curious(product)(problem)
    loss = problem.inner_parts()[0][0]().item()  # of differences it is that at one of their two points
    assert [found.inner_loss.item(), found.statistics["loss"]] == pytest.approx([loss, loss], rel=1e-6)
    assert found.statistics["seen"] == 1.0
    assert ("finite_difference_error" in found.statistics) == isinstance(product, FiniteDifference)
    assert found.statistics["products"] == 3


@pytest.mark.parametrize("make", [lambda: SAMA(), lambda: Unrolled()])
def test_estimators_that_differentiate_the_optimizer_name_what_they_need(make):
    theta, phi = theta_phi()
    problem = BilevelProblem(lambda: (theta * phi).square().sum(), lambda: theta.square().sum(), [theta], [phi])
    estimator = make()
    for optimizer, message in (
        (None, "`inner_optimizer`, which must be one of SGD, Adam, AdamW; none is given"),
        (torch.optim.Rprop([theta]), "it is Rprop"),
        (torch.optim.Adam([phi]), "does not hold 1 of the `inner_parameters`"),
    ):
        ask = estimator.observe if isinstance(estimator, Unrolled) else estimator
        with pytest.raises(ConfigurationError, match=message):
            ask(replace(problem, inner_optimizer=optimizer))


@pytest.mark.parametrize("make", [lambda: NaturalHypergradient(), lambda: Unrolled()])
def test_estimators_that_watch_the_inner_steps_say_so(make):
    problem, _, _ = tied_network()
    with pytest.raises(ConfigurationError, match=r"call `observe\(problem\)` after the backward pass"):
        make()(problem)


def test_an_inner_step_without_a_gradient_is_not_taken_for_a_gradient_of_zero():
    problem, _, _ = tied_network()
    with pytest.raises(ConfigurationError, match="was shown an inner step without a gradient"):
        NaturalHypergradient().observe(problem)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": []}, "needs at least one part"),
        ({"losses": [sum], "weights": [1.0, 2.0]}, "1 losses and 2 weights"),
        ({"losses": [sum], "weights": [0.0]}, "must be positive"),
    ],
)
def test_bad_micro_batches_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MicroBatches(**arguments)
