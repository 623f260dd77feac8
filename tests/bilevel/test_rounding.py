"""What adding in another order changes, against the bounds that the tests of differences have."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diopt_lightning.bilevel import BilevelProblem, FiniteDifference
from tests.bilevel.problems import flat, randn, relative_error, rounding_of_differences

ROWS, SIZE = 12, 3


def regression(rows: Tensor, columns: Tensor, count: int) -> BilevelProblem:
    """The weighted regression of the tests of products on its first rows, which are added in the given order."""
    x, y, phi = randn(ROWS, SIZE, seed=0), randn(ROWS, seed=1), randn(ROWS, seed=2).requires_grad_()
    theta, rows = randn(SIZE, seed=3).requires_grad_(), rows[rows < count]

    def loss() -> Tensor:
        outputs = (x[rows][:, columns] @ theta[columns]).tanh()
        return (phi[rows].sigmoid() * F.mse_loss(outputs, y[rows], reduction="none")).mean()

    return BilevelProblem(loss, loss, [theta], [phi])


@pytest.mark.parametrize("count", [ROWS, SIZE])
def test_differences_in_other_orders_are_within_their_rounding(count):
    v = [randn(SIZE, seed=7)]
    generator = torch.Generator().manual_seed(0)
    plain = regression(torch.arange(ROWS), torch.arange(SIZE), count)
    with FiniteDifference().linearize(plain) as linearization:
        expected = linearization.both(v)
    for _ in range(100):
        orders = (torch.randperm(size, generator=generator) for size in (ROWS, SIZE))
        with FiniteDifference(check=False).linearize(regression(*orders, count)) as linearization:
            found = linearization.both(v)
        tolerances = rounding_of_differences(plain, v, expected)
        for a, b, tolerance in zip(found, expected, tolerances, strict=True):
            assert relative_error(a, flat(b)) < tolerance
