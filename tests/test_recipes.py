"""The recipes of the builders' page, made outside of the package and put through what is claimed of their kinds."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import diopt_lightning
from diopt_lightning.bilevel import Chebyshev, ConjugateGradient
from tests import backbones, forms
from tests.bilevel import test_guarantees, test_products
from tests.bilevel.problems import Network, relative_error
from tests.test_metrics import ITEMS, adds_up_and_resets, equals_the_score

pytestmark = pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")


def recipes() -> dict[str, Any]:
    """What the page defines, its blocks run one after the other as in a notebook."""
    page = (Path(diopt_lightning.__file__).parent / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "recipes"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "diopt_lightning/README.md", "exec"), names)
    return names


RECIPES = recipes()


@pytest.mark.parametrize("check", test_guarantees.CHECKS, ids=lambda check: check.__name__)
def test_an_estimator(check):
    check(RECIPES["SteepestDescent"])


@pytest.mark.parametrize("check", test_products.CHECKS, ids=lambda check: check.__name__)
def test_a_product(check):
    check(RECIPES["Rebuilding"])


def test_the_product_serves_every_solver():
    case = Network()
    found = ConjugateGradient(60, damping=0.0, tolerance=1e-12, product=RECIPES["Rebuilding"]())(case.problem)
    assert relative_error(found.gradient, case.expected) < 1e-9
    few = [Chebyshev(3, product=product)(case.problem).gradient[0] for product in (RECIPES["Rebuilding"](), None)]
    assert relative_error(few[:1], few[1]) < 1e-12


@pytest.mark.parametrize("check", forms.CHECKS, ids=lambda check: check.__name__)
def test_an_instruction(check, tmp_path):
    check(forms.Form(lambda: RECIPES["SharedEmbedder"](length=3)), tmp_path)


@pytest.mark.parametrize("check", backbones.CHECKS, ids=lambda check: check.__name__)
def test_a_backbone(check):
    check(RECIPES["BagOfWords"])


@settings(max_examples=50, deadline=None)
@given(items=ITEMS)
def test_a_metric(items):
    equals_the_score(RECIPES["FirstWord"], lambda text, reference: text.split()[:1] == reference.split()[:1], items)


def test_a_metric_adds_up_and_resets():
    adds_up_and_resets(RECIPES["FirstWord"])
