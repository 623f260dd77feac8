"""What estimators say about themselves: residuals, curvature, and when not to trust them, with the number to set."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diopt_lightning.bilevel import (
    BilevelProblem,
    Chebyshev,
    ConjugateGradient,
    ConvergenceWarning,
    DoubleBackward,
    Identity,
    MinRes,
    Neumann,
    Nystrom,
    Penalty,
    Spectrum,
)
from diopt_lightning.bilevel.estimators.spectrum import ritz_values
from tests.bilevel.problems import Quadratic, randn, relative_error
from tests.tolerances import Error

pytestmark = pytest.mark.filterwarnings("error::diopt_lightning.bilevel.ConvergenceWarning")


def suggested(message: str, name: str) -> float:
    """The number that a warning says to set."""
    return float(message.split(f"set `{name}` to ")[1].split()[0].rstrip(":,."))


def indefinite(curvatures: list[float]) -> tuple[BilevelProblem, Tensor]:
    """A saddle with the given curvatures, and the solution of its system."""
    curvature = torch.tensor(curvatures, dtype=torch.float64)
    theta = torch.ones_like(curvature).requires_grad_()
    phi = torch.ones_like(curvature).requires_grad_()
    weights = torch.arange(1, len(curvature) + 1, dtype=torch.float64)
    problem = BilevelProblem(
        lambda: (curvature * theta**2).sum() / 2 - theta @ phi, lambda: weights @ theta, [theta], [phi]
    )
    return problem, weights / curvature


def test_lanczos_finds_both_ends_of_the_spectrum_from_inside():
    problem, _ = indefinite([-2.0, 0.5, 1.0, 2.0, 5.0])
    with DoubleBackward().linearize(problem) as linearization:
        start = [randn(5, seed=5)]
        few = ritz_values(linearization, start, products=2)
        many = ritz_values(linearization, start, products=50)
        assert -2 <= few[0].value < few[1].value <= 5
        assert [each.value for each in many] == pytest.approx([-2.0, 0.5, 1.0, 2.0, 5.0], rel=1e-9)
        assert [each.share for each in many] == pytest.approx((start[0].square() / start[0].square().sum()).tolist())
        assert all(each.error < 1e-5 for each in many)
        for value, error, _ in few:
            assert min(abs(value - other) for other in (-2.0, 0.5, 1.0, 2.0, 5.0)) <= error
        assert ritz_values(linearization, [torch.zeros(5).double()], products=3) == [(0.0, 0.0, 1.0)]


def test_statistics_say_what_was_met():
    problem, _ = indefinite([-2.0, 0.5, 1.0, 2.0, 5.0])
    statistics = MinRes(products=6)(problem).statistics
    assert statistics["products"] == 6
    assert Error(statistics["residual"]) < 1e-6
    assert 2 < statistics["largest_eigenvalue"] <= 5
    assert -2 <= statistics["negative_curvature"] < 0
    assert statistics["seconds"] > 0
    assert Identity()(Quadratic().problem).statistics["negative_curvature"] == 0


def test_too_large_a_step_turns_the_answer_around_and_is_warned_of_with_the_number_to_set():
    case = Quadratic()
    largest = torch.linalg.eigvalsh(case.hessian).max().item()
    with pytest.warns(ConvergenceWarning, match="set `step_size` to") as caught:
        estimate = Neumann(terms=21, step_size=3 / largest)(case.problem)
    assert estimate.statistics["residual"] > 1
    assert F.cosine_similarity(estimate.gradient[0], case.expected, dim=0) < 0
    number = suggested(str(caught[0].message), "step_size")
    assert number < 2 / largest
    assert relative_error(Neumann(terms=3000, step_size=number)(case.problem).gradient, case.expected) < 1e-6


def test_too_large_a_step_of_the_penalty_method_is_warned_of_with_the_number_to_set():
    case = Quadratic()
    largest = torch.linalg.eigvalsh(case.hessian).max().item()
    with pytest.warns(ConvergenceWarning, match="Penalty diverges: after 21 steps") as caught:
        Penalty(steps=21, step_size=3 / largest)(case.problem)
    number = suggested(str(caught[0].message), "step_size")
    assert number < 2 / largest
    estimate = Penalty(steps=3000, step_size=number, multiplier=1e7)(case.problem)
    assert relative_error(estimate.gradient, case.expected) < 1e-6


def test_negative_curvature_is_warned_of_as_that():
    problem, _ = indefinite([1.0, -1.0])
    with pytest.warns(ConvergenceWarning, match="negative curvature of -"):
        Neumann(terms=5, step_size=0.5)(problem)
    with pytest.warns(ConvergenceWarning, match="the way followed negative curvature: use fewer `steps`"):
        Penalty(steps=20, step_size=0.5)(problem)


def test_conjugate_gradients_stop_at_negative_curvature_and_say_which_damping_is_needed():
    problem, _ = indefinite([5.0, 2.0, -1.0])
    with pytest.warns(ConvergenceWarning, match="ConjugateGradient met a negative curvature") as caught:
        estimate = ConjugateGradient(damping=0.0)(problem)
    assert estimate.statistics["stopped_early"] == 1
    number = suggested(str(caught[0].message), "damping")
    assert 0 < number <= 2
    damped = ConjugateGradient(damping=2.0)(problem)
    assert damped.statistics["stopped_early"] == 0
    weights, curvature = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([5.0, 2.0, -1.0]).double()
    assert relative_error(damped.gradient, weights / (curvature + 2)) < 1e-6
    # Left to itself, the damping is enough for the curvature that the spectrum shows.
    assert ConjugateGradient()(problem).statistics["stopped_early"] == 0


def test_minres_solves_what_is_indefinite():
    problem, solution = indefinite([-2.0, 0.5, 1.0, 2.0, 5.0])
    residuals = [MinRes(products)(problem).statistics["residual"] for products in range(2, 7)]
    assert residuals == sorted(residuals, reverse=True)
    assert relative_error(MinRes()(problem).gradient, solution) < 1e-6


def test_chebyshev_damps_negative_curvature_by_itself():
    problem, _ = indefinite([5.0, 1.0, 0.5, -0.5])
    statistics = Chebyshev(products=20)(problem).statistics
    assert statistics["damping"] == pytest.approx(1.0, rel=1e-6)
    with pytest.warns(ConvergenceWarning, match="set `damping` to") as caught:
        Chebyshev(products=20, damping=0.0)(problem)
    number = suggested(str(caught[0].message), "damping")
    Chebyshev(products=20, damping=number)(problem)  # a warning would be an error here


def test_nystrom_with_too_little_damping_for_its_rank_is_warned_of_with_the_number_to_set():
    case = Quadratic()
    with pytest.warns(ConvergenceWarning, match="that the sketch does not see: set `damping` to") as caught:
        Nystrom(rank=1, damping=1e-3)(case.problem)
    number = suggested(str(caught[0].message), "damping")
    Nystrom(rank=1, damping=number)(case.problem)  # a warning would be an error here


def test_warns_once_only():
    estimator = Neumann(terms=5, step_size=10.0)
    with pytest.warns(ConvergenceWarning):
        estimator(Quadratic().problem)
    estimator(Quadratic().problem)  # a second warning would be an error here


def test_the_spectrum_is_refreshed_on_schedule_and_survives_a_checkpoint():
    case = Quadratic()
    make = [lambda: Neumann(spectrum=Spectrum(4, 3)), lambda: Chebyshev(2, spectrum=Spectrum(4, 3))]
    for estimator, resumed in [(function(), function()) for function in make]:
        products = [estimator(case.problem).statistics["products"] for _ in range(5)]
        assert products == [6, 2, 2, 6, 2]
        resumed.load_state_dict(estimator.state_dict())
        assert [resumed(case.problem).statistics["products"] for _ in range(3)] == [2, 6, 2]


@pytest.mark.parametrize("make", [lambda: Neumann(terms=3000), lambda: Chebyshev(300, accuracy=1e-9)])
def test_a_bound_that_has_aged_is_corrected_before_the_solver_diverges(make):
    case, estimator = Quadratic(), make()
    estimator.spectrum.load_state_dict({"lowest": 0.0, "largest": 1e-3, "age": 1})
    estimate = estimator(case.problem)
    assert relative_error(estimate.gradient, case.expected) < 1e-6
    assert estimate.statistics["products"] > getattr(estimator, "products", 3001)  # what was begun with it counts
    assert estimate.statistics["largest_eigenvalue"] > 1


def test_a_warm_start_gets_closer_from_call_to_call():
    case, estimator = Quadratic(), Chebyshev(products=4, warm_start=True)
    errors = [float(relative_error(estimator(case.problem).gradient, case.expected)) for _ in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Neumann(terms=-1), "terms"),
        (lambda: Neumann(step_size=0.0), "step_size"),
        (lambda: Spectrum(products=0), "products"),
        (lambda: Spectrum(refresh_every=0), "refresh_every"),
        (lambda: Chebyshev(products=0), "products"),
        (lambda: Chebyshev(accuracy=1.0), "accuracy"),
        (lambda: Chebyshev(products=1, warm_start=True), "warm_start"),
        (lambda: ConjugateGradient(products=1), "products"),
        (lambda: ConjugateGradient(damping=-1.0), "damping"),
        (lambda: ConjugateGradient(tolerance=-1.0), "tolerance"),
        (lambda: MinRes(products=1), "products"),
        (lambda: MinRes(tolerance=-1.0), "tolerance"),
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: Nystrom(damping=0.0), "damping"),
        (lambda: Identity(step_size=0.0), "step_size"),
        (lambda: Penalty(steps=0), "steps"),
        (lambda: Penalty(multiplier=0.0), "multiplier"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()
