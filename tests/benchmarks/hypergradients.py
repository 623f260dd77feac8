"""How close every estimator comes to hypergradients that are known, as tables for the package's documentation.

Run ``python -m tests.benchmarks.hypergradients`` in the repository's root; it takes some minutes on one core.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    Chebyshev,
    ConjugateGradient,
    ConvergenceWarning,
    DoubleBackward,
    FiniteDifference,
    GaussNewton,
    HypergradientEstimator,
    Identity,
    MinRes,
    NaturalHypergradient,
    Neumann,
    Nystrom,
    Penalty,
    ReverseOverForward,
    Unrolled,
)
from tests.benchmarks.problems import (
    Kind,
    LanguageModelProblem,
    dense_hypergradient,
    flat,
    language_model_problem,
    retraining_problem,
)

README = Path(__file__).resolve().parents[2] / "diopt_lightning" / "bilevel" / "README.md"
SEEDS = (0, 1, 2)
PRODUCTS = (1, 5, 20, 100)
INNER_STEPS = (1, 5, 20, None)
MODELS: dict[str, Kind] = {"T5": "t5", "Llama": "llama"}
WARNED = "†"


@dataclass(frozen=True)
class Measurement:
    """How close one estimate is.

    Attributes:
        cosine: To the true hypergradient.
        error: Norm of the difference, relative to the true hypergradient.
        warned: Whether the estimator said that it should not be trusted.
    """

    cosine: float
    error: float
    warned: bool


def measured(estimator: HypergradientEstimator, problem: BilevelProblem, expected: Tensor) -> Measurement:
    """Compare an estimate with the true hypergradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = flat(estimator(problem).gradient)
    warned = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return compared(found, expected, warned)


def compared(found: Tensor, expected: Tensor, warned: bool = False) -> Measurement:
    """Compare a hypergradient with the true one."""
    found = found.to(expected.dtype)
    cosine = F.cosine_similarity(found, expected, dim=0).item()
    return Measurement(cosine, ((found - expected).norm() / expected.norm()).item(), warned)


def entry(measurements: Sequence[Measurement], with_error: bool = False) -> str:
    """Write the measurements of all seeds: mean cosine, lowest cosine, mean relative error; a dash for none."""
    if not measurements:
        return "-"
    cosines = [m.cosine for m in measurements]
    text = f"{mean(cosines):.3f} ({min(cosines):.3f})"
    if with_error:
        error = mean([m.error for m in measurements])
        text += f", {error:.2f}" if error < 100 else f", {error:.0e}"
    return text + (f" {WARNED}" if any(m.warned for m in measurements) else "")


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------------ dense solve


@dataclass(frozen=True)
class DenseRow:
    """An estimator in the table of the dense solve.

    Attributes:
        name: What the table calls it.
        make: Returns the estimator for a number of products and the damping; ``None`` where there is no such.
        form: Which form of the problem it is given.
        scaled: Whether the scale of its estimate means something.
    """

    name: str
    make: Callable[[int, float], HypergradientEstimator | None]
    form: Callable[[LanguageModelProblem], BilevelProblem] = lambda lm: lm.damped
    scaled: bool = True


def once(make: Callable[[], HypergradientEstimator]) -> Callable[[int, float], HypergradientEstimator | None]:
    """Make an estimator of a single product for the first column alone."""
    return lambda products, _: make() if products == 1 else None


def from_two(
    make: Callable[[int, float], HypergradientEstimator],
) -> Callable[[int, float], HypergradientEstimator | None]:
    """Leave the first column out."""
    return lambda products, damping: make(products, damping) if products > 1 else None


def single(problem: LanguageModelProblem) -> BilevelProblem:
    """The form for differences of gradients."""
    return problem.single


DENSE_ROWS = (
    DenseRow("`Identity`", once(Identity), scaled=False),
    DenseRow("`SAMA`", once(lambda: SAMA(product=DoubleBackward())), scaled=False),
    DenseRow("`NaturalHypergradient`, diagonal", once(NaturalHypergradient), scaled=False),
    DenseRow("`NaturalHypergradient`, rank 1, 5, 20, 100", lambda n, _: NaturalHypergradient(rank=n), scaled=False),
    DenseRow("`Unrolled`", lambda n, _: Unrolled(steps=n)),
    DenseRow("`Neumann`", lambda n, _: Neumann(terms=n - 1)),
    DenseRow("`Chebyshev`", lambda n, _: Chebyshev(products=n)),
    DenseRow("`ConjugateGradient`", from_two(lambda n, _: ConjugateGradient(products=n, damping=0.0))),
    DenseRow("`MinRes`", from_two(lambda n, _: MinRes(products=n))),
    DenseRow(
        "`Nystrom`", from_two(lambda n, damping: Nystrom(rank=n - 1, damping=damping)), form=lambda lm: lm.undamped
    ),
    DenseRow("`Penalty`", lambda n, _: Penalty(steps=n), form=single),
    DenseRow("`Chebyshev`, `ReverseOverForward`", lambda n, _: Chebyshev(products=n, product=ReverseOverForward())),
    DenseRow("`Chebyshev`, `GaussNewton`", lambda n, _: Chebyshev(products=n, product=GaussNewton())),
    DenseRow(
        "`Chebyshev`, `FiniteDifference('central')`",
        lambda n, _: Chebyshev(products=n, product=FiniteDifference("central")),
        form=single,
    ),
    DenseRow(
        "`Chebyshev`, `FiniteDifference('forward')`",
        lambda n, _: Chebyshev(products=n, product=FiniteDifference("forward")),
        form=single,
    ),
)


def dense_table(kind: Kind) -> str:
    """Compare all estimators with dense solves of one kind of model."""
    cells: dict[tuple[str, int], list[Measurement]] = {}
    for seed in SEEDS:
        start = time.perf_counter()
        for key, measurement in dense_measurements(kind, seed).items():
            cells.setdefault(key, []).append(measurement)
        print(f"{kind}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = [
        [row.name, *(entry(cells.get((row.name, products), []), row.scaled) for products in PRODUCTS)]
        for row in DENSE_ROWS
    ]
    return table(["products", *map(str, PRODUCTS)], rows)


def dense_measurements(kind: Kind, seed: int) -> dict[tuple[str, int], Measurement]:
    """Compare all estimators with one dense solve."""
    # What looks at inner steps must be there before they are taken.
    natural = {n: NaturalHypergradient(rank=n) for n in PRODUCTS}
    diagonal = NaturalHypergradient()
    unrolled = {n: Unrolled(steps=n) for n in PRODUCTS}
    problem = language_model_problem(kind, seed, [diagonal, *natural.values()], [*unrolled.values()])
    expected = dense_hypergradient(problem.damped)
    found = {}
    for row in DENSE_ROWS:
        for products in PRODUCTS:
            estimator = row.make(products, problem.damping)
            if isinstance(estimator, NaturalHypergradient):
                estimator = diagonal if estimator.rank is None else natural[estimator.rank]
            if isinstance(estimator, Unrolled):
                estimator = unrolled[estimator.steps]
            if estimator is not None:
                found[row.name, products] = measured(estimator, row.form(problem), expected)
    return found


def dense_section() -> str:
    """Return the tables of the dense solve."""
    return "\n\n".join(f"{name}:\n\n{dense_table(kind)}" for name, kind in MODELS.items())


# ------------------------------------------------------------------------------------------------------- retraining

RETRAINING_ROWS: dict[str, Callable[[int], HypergradientEstimator]] = {
    "`Identity`": lambda _: Identity(),
    "`SAMA`": lambda _: SAMA(),
    "`NaturalHypergradient`, diagonal": lambda _: NaturalHypergradient(),
    "`NaturalHypergradient`, rank 20": lambda _: NaturalHypergradient(rank=20),
    "`Unrolled`, all steps since the outer one": lambda steps: Unrolled(steps=steps),
    "`Neumann`, 5 products": lambda _: Neumann(terms=4),
    "`Neumann`, 20 products": lambda _: Neumann(terms=19),
    "`Chebyshev`, 5 products": lambda _: Chebyshev(products=5),
    "`Chebyshev`, 20 products": lambda _: Chebyshev(products=20),
    "`ConjugateGradient`, 5 products": lambda _: ConjugateGradient(products=5),
    "`ConjugateGradient`, 20 products": lambda _: ConjugateGradient(products=20),
    "`MinRes`, 5 products": lambda _: MinRes(products=5),
    "`MinRes`, 20 products": lambda _: MinRes(products=20),
    "`Nystrom`, 5 products": lambda _: Nystrom(rank=4),
    "`Nystrom`, 20 products": lambda _: Nystrom(rank=19),
    "`Penalty`, 5 products": lambda _: Penalty(steps=5),
    "`Penalty`, 20 products": lambda _: Penalty(steps=20),
    "`Chebyshev`, 5 products by `GaussNewton`": lambda _: Chebyshev(products=5, product=GaussNewton()),
    "`Chebyshev`, 20 products by `GaussNewton`": lambda _: Chebyshev(products=20, product=GaussNewton()),
    "`Chebyshev`, 5 products by `FiniteDifference('central')`": lambda _: Chebyshev(
        products=5, product=FiniteDifference("central")
    ),
    "`Chebyshev`, 5 products by `FiniteDifference('forward')`": lambda _: Chebyshev(
        products=5, product=FiniteDifference("forward")
    ),
}
DENSE = "dense solve at the same point"
DISTANCE = "distance to the new minimum"


def retraining_section() -> str:
    """Return the table of the true hypergradient."""
    cells: dict[tuple[str, int | None], list[Measurement]] = {}
    distances: dict[int | None, list[float]] = {steps: [] for steps in INNER_STEPS}
    for seed in SEEDS:
        for steps in INNER_STEPS:
            # None has no steps to unroll.
            estimators = {
                name: make(steps or 1)
                for name, make in RETRAINING_ROWS.items()
                if steps is not None or not name.startswith("`Unrolled`")
            }
            case = retraining_problem(seed, steps, list(estimators.values()))
            distances[steps].append(case.distance)
            cells.setdefault((DENSE, steps), []).append(compared(dense_hypergradient(case.problem), case.expected))
            for name, estimator in estimators.items():
                cells.setdefault((name, steps), []).append(measured(estimator, case.problem, case.expected))
    rows = [
        [DISTANCE, *(f"{mean(distances[steps]):.2f} ({max(distances[steps]):.2f})" for steps in INNER_STEPS)],
        *(
            [name, *(entry(cells.get((name, steps), [])) for steps in INNER_STEPS)]
            for name in (DENSE, *RETRAINING_ROWS)
        ),
    ]
    return table(["inner steps", *("to convergence" if steps is None else str(steps) for steps in INNER_STEPS)], rows)


# ------------------------------------------------------------------------------------------------------------- main

SECTIONS = {"dense": ("dense solve", dense_section), "retraining": ("retraining", retraining_section)}


def between(text: str, name: str, content: str) -> str:
    """Replace what stands between the marker comments of a section.

    Raises:
        ValueError: If the markers are missing.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"{README.name} must have {first} and {last} once each.")
    head, rest = text.split(first)
    return f"{head}{first}\n\n{content}\n\n{last}{rest.split(last)[1]}"


def main() -> None:
    """Compute the tables, print them and write them into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one of the tables")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("diopt_lightning").setLevel(logging.ERROR)
    for key in [only] if only else SECTIONS:
        name, section = SECTIONS[key]
        start = time.perf_counter()
        content = section()
        print(f"\n{content}\n\n{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
        README.write_text(between(README.read_text(encoding="utf-8"), name, content), encoding="utf-8")


if __name__ == "__main__":
    main()
