"""All estimators and products that are exported, each in settings of which tests claim something.

An estimator that gets a row in ``ESTIMATORS`` runs through every test that claims something of all of them, and a
product that gets one in ``PRODUCTS`` likewise. Where one is exported and has none, a test fails
(``tests/bilevel/test_guarantees.py``).
"""

from collections.abc import Callable, Iterable
from enum import Flag, auto
from typing import Any, NamedTuple

from diopt_lightning import bilevel
from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    Chebyshev,
    ConjugateGradient,
    DoubleBackward,
    FiniteDifference,
    GaussNewton,
    Hypergradient,
    HypergradientEstimator,
    Identity,
    MinRes,
    NaturalHypergradient,
    Neumann,
    Nystrom,
    Penalty,
    Product,
    ReverseOverForward,
    Spectrum,
    Unrolled,
)
from tests.helpers import concrete_classes

Make = Callable[[], HypergradientEstimator]


class Claim(Flag):
    """What tests claim of an estimator in one setting."""

    #: It leaves nothing behind, counts tied parameters once, is resumed bitwise and so on: what all of them guarantee.
    GUARANTEES = auto()
    #: Two processes compute what one does with the double batch, to 1e-10 in float64. (Differences over the short
    #: distances that some choose by themselves multiply the rounding of sums in another order, by 1e-9 and more.)
    PROCESSES = auto()
    #: Two processes that share a model under FSDP2 compute what one does.
    SHARDED = auto()
    #: It converges to the closed form.
    EXACT = auto()
    #: What is claimed where nothing is said.
    COMMON = GUARANTEES | PROCESSES


class Row(NamedTuple):
    """One setting of an estimator; its name is unique."""

    name: str
    make: Make
    claims: Claim = Claim.COMMON


class Repeated(HypergradientEstimator):
    """Calls an estimator several times at the same point."""

    def __init__(self, estimator: HypergradientEstimator, times: int) -> None:
        self.estimator, self.times = estimator, times

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        return [self.estimator(problem) for _ in range(self.times)][-1]


def differences(scheme: Any = "central") -> FiniteDifference:
    return FiniteDifference(scheme)


ESTIMATORS = [
    Row("neumann", lambda: Neumann(terms=3, spectrum=Spectrum(refresh_every=2)), Claim.GUARANTEES),
    Row("neumann_step_size", lambda: Neumann(terms=2, step_size=1e-2), Claim.PROCESSES),
    Row("neumann_differences", lambda: Neumann(terms=3, product=differences()), Claim.SHARDED),
    Row("neumann_forward", lambda: Neumann(terms=1, step_size=0.1, product=differences("forward")), Claim.SHARDED),
    Row("neumann_exact", lambda: Neumann(terms=3000), Claim.EXACT),
    Row("neumann_exact_forward", lambda: Neumann(terms=3000, product=differences("forward")), Claim.EXACT),
    Row("chebyshev", Chebyshev, Claim.PROCESSES),
    Row("chebyshev_warm", lambda: Chebyshev(warm_start=True), Claim.GUARANTEES),
    Row("chebyshev_forward_mode", lambda: Chebyshev(products=2, product=ReverseOverForward()), Claim.PROCESSES),
    Row(
        "chebyshev_differences",
        lambda: Chebyshev(spectrum=Spectrum(products=3), warm_start=True, product=differences()),
        Claim.SHARDED,
    ),
    Row("chebyshev_exact", lambda: Chebyshev(products=300, accuracy=1e-9), Claim.EXACT),
    Row(
        "chebyshev_exact_warm",
        lambda: Repeated(Chebyshev(products=20, accuracy=1e-3, warm_start=True), times=6),
        Claim.EXACT,
    ),
    Row("conjugate_gradient", lambda: ConjugateGradient(products=5, warm_start=True), Claim.GUARANTEES),
    Row("conjugate_gradient_few", lambda: ConjugateGradient(products=3, product=GaussNewton()), Claim.PROCESSES),
    Row(
        "conjugate_gradient_differences",
        lambda: ConjugateGradient(products=3, damping=1.0, product=differences()),
        Claim.PROCESSES | Claim.SHARDED,
    ),
    Row("conjugate_gradient_exact", lambda: exact_conjugate_gradient(DoubleBackward()), Claim.EXACT),
    Row("conjugate_gradient_exact_forward_mode", lambda: exact_conjugate_gradient(ReverseOverForward()), Claim.EXACT),
    Row("conjugate_gradient_exact_differences", lambda: exact_conjugate_gradient(differences()), Claim.EXACT),
    Row(
        "conjugate_gradient_exact_warm",
        lambda: Repeated(ConjugateGradient(products=8, damping=0.0, warm_start=True), times=6),
        Claim.EXACT,
    ),
    Row("minres", lambda: MinRes(products=5, warm_start=True), Claim.GUARANTEES),
    Row("minres_few", lambda: MinRes(products=3), Claim.PROCESSES),
    Row("minres_differences", lambda: MinRes(products=3, product=differences()), Claim.SHARDED),
    Row("minres_exact", lambda: MinRes(products=60, tolerance=1e-12), Claim.EXACT),
    Row("minres_exact_warm", lambda: Repeated(MinRes(products=8, warm_start=True), times=8), Claim.EXACT),
    Row("nystrom", lambda: Nystrom(rank=3), Claim.GUARANTEES),
    Row("nystrom_few", lambda: Nystrom(rank=2), Claim.PROCESSES),
    Row("nystrom_exact", lambda: Nystrom(rank=64, damping=1e-9), Claim.EXACT),
    Row("identity", Identity),
    Row("identity_unchecked", lambda: Identity(product=FiniteDifference(check=False)), Claim.PROCESSES),
    Row("identity_differences", lambda: Identity(product=differences()), Claim.SHARDED),
    Row("sama", SAMA, Claim.GUARANTEES | Claim.SHARDED),
    Row("sama_double_backward", lambda: SAMA(product=DoubleBackward()), Claim.COMMON),
    Row("unrolled", lambda: Unrolled(steps=2)),
    Row("unrolled_differences", lambda: Unrolled(steps=2, product=differences()), Claim.SHARDED),
    Row("unrolled_exact", lambda: Unrolled(steps=1000), Claim.EXACT),
    Row("penalty", lambda: Penalty(warm_start=True), Claim.GUARANTEES),
    Row("penalty_short", lambda: Penalty(steps=2, step_size=1e-2, multiplier=10.0), Claim.PROCESSES),
    Row("penalty_warm", lambda: Penalty(steps=2, warm_start=True), Claim.SHARDED),
    Row("penalty_multiplier", lambda: Penalty(steps=2, step_size=0.05, multiplier=100.0), Claim.SHARDED),
    # Its bias is up to 5 / multiplier in these cases, and rounding adds some multiplier * eps: 1e8 leaves 1e-7 of both.
    Row("penalty_exact", lambda: Penalty(steps=2000, multiplier=1e8), Claim.EXACT),
    Row(
        "penalty_exact_warm",
        lambda: Repeated(Penalty(steps=100, multiplier=1e8, warm_start=True), times=20),
        Claim.EXACT,
    ),
    Row("natural", NaturalHypergradient, Claim.GUARANTEES),
    Row("natural_low_rank", lambda: NaturalHypergradient(rank=2)),
    Row("natural_differences", lambda: NaturalHypergradient(product=differences()), Claim.SHARDED),
    Row("natural_low_rank_differences", lambda: NaturalHypergradient(rank=2, product=differences()), Claim.SHARDED),
]


def exact_conjugate_gradient(product: Product) -> ConjugateGradient:
    return ConjugateGradient(products=60, damping=0.0, tolerance=1e-12, product=product)


def claiming(claim: Claim, rows: Iterable[Row] = tuple(ESTIMATORS)) -> dict[str, Make]:
    """The settings of which something is claimed, by name."""
    return {row.name: row.make for row in rows if claim in row.claims}


class ProductRow(NamedTuple):
    """One setting of a product.

    Args:
        name: Unique.
        make: Makes it.
        error: How far it is from dense matrices in float64, relative to them; ``None`` where the Hessian is another.
    """

    name: str
    make: Callable[[], Product]
    error: float | None


PRODUCTS = [
    ProductRow("double_backward", DoubleBackward, 1e-12),
    ProductRow("reverse_over_forward", ReverseOverForward, 1e-12),
    ProductRow("central_differences", FiniteDifference, 1e-8),
    ProductRow("forward_differences", lambda: FiniteDifference("forward"), 1e-5),
    ProductRow("gauss_newton", GaussNewton, None),
]


def exported(base: type) -> list[Any]:
    """The classes of ``diopt_lightning.bilevel`` that a user chooses among in place of ``base``."""
    return concrete_classes(bilevel, base)
