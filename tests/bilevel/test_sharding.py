"""Sharded inner parameters: two processes under FSDP2 compute what one does with both batches."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diopt_lightning import ConfigurationError
from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    Chebyshev,
    DoubleBackward,
    FiniteDifference,
    HypergradientEstimator,
    MicroBatches,
    Neumann,
    Nystrom,
    Penalty,
    Product,
    Unrolled,
    average_over_processes,
)
from diopt_lightning.bilevel.sharding import is_sharded
from tests.estimators import Claim, claiming, exported
from tests.processes import on_two_processes

pytestmark = pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")


SHARDABLE = claiming(Claim.SHARDED)


class Setting:
    """Learned weights of rows, and layers whose odd sizes leave a process an empty shard."""

    def __init__(self, micro_batches: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(8, size, generator=generator).double() for size in (3, 1))
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(size, 5), nn.Tanh()) for size in (3, 5)), nn.Linear(5, 1)
        ).double()
        self.phi = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        self.micro_batches = micro_batches

    def shard(self) -> None:
        mesh = init_device_mesh("cpu", (2,))
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.layers, mesh=mesh)

    def problem(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> BilevelProblem:
        def inner(rows: Tensor) -> Tensor:
            errors = (self.layers(self.scale * self.x[rows]) - self.y[rows]).square().squeeze(1)
            return (self.phi[rows].sigmoid() * errors).mean() + 0.1 * self.phi.square().mean()

        parts = MicroBatches([lambda part=part: inner(part) for part in rows.chunk(self.micro_batches)])
        return BilevelProblem(
            parts,
            lambda: (self.layers(self.x[rows]) - 1).square().mean(),
            list(self.layers.parameters()),
            [self.phi, self.scale],
            average=average_over_processes,
            inner_optimizer=optimizer,
            inner_gradient_clip=0.5,
        )

    def run(self, estimator: HypergradientEstimator, rows: Tensor) -> list[Tensor]:
        """Two rounds of two inner steps and a hypergradient, which a resumed copy of the estimator computes last."""
        optimizer = torch.optim.Adam(self.layers.parameters(), lr=0.05)
        found: list[Tensor] = []
        for round_ in range(2):
            for _ in range(2):
                problem = self.problem(rows, optimizer)
                optimizer.zero_grad()
                for part, weight in problem.inner_parts():
                    (weight * part()).backward()
                self.phi.grad = self.scale.grad = None
                estimator.observe(problem)
                optimizer.step()
            if round_ == 1 and not estimator.recorded_steps:
                state = estimator.state_dict()
                assert not any(is_sharded(x) for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, Tensor))
                estimator = copy.deepcopy(estimator)
                estimator.load_state_dict(state)
            before = [parameter.grad for parameter in problem.inner_parameters]
            estimate = estimator(problem)
            assert all(a is p.grad for a, p in zip(before, problem.inner_parameters, strict=True))
            assert self.phi.grad is None
            statistics = {name: value for name, value in estimate.statistics.items() if name != "seconds"}
            found += [*estimate.gradient, torch.tensor(list(statistics.values()), dtype=torch.float64)]
        return found


def compare(
    make: Callable[[], HypergradientEstimator], expected: list[Tensor], micro_batches: int, tolerance: float
) -> None:
    distributed.init_process_group("gloo")
    setting = Setting(micro_batches)
    setting.shard()
    assert all(is_sharded(parameter) for parameter in setting.layers.parameters())
    found = setting.run(make(), torch.arange(distributed.get_rank(), 8, 2))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [*((name, 1) for name in SHARDABLE), ("chebyshev_differences", 2), ("sama", 2), ("penalty_warm", 2)],
)
def test_two_processes_that_share_a_model_equal_one(name, micro_batches):
    estimator = SHARDABLE[name]()
    if not isinstance(estimator, Penalty):
        estimator.product._checked = True  # one process could check its differences, and say so in its statistics
    expected = Setting(micro_batches).run(estimator, torch.arange(8))
    assert expected[0].norm() > 0
    # Differences magnify rounding, by the square root of the precision or by its third.
    tolerance = 1e-7 if name.startswith(("penalty", "neumann_forward")) else 1e-9
    if name.startswith("natural"):
        # `rounding_of_differences` is proportional to p: 16 eps |g| |p| / distance = 7e-10 |p|, with |g| = 0.15 and a
        # distance of 7e-7. That of the others is 0.3 to 1.8, that of these is divided by their damping: 80 and 160.
        # The hypergradient is longer too, which the relative tolerance covers, but some of its entries are not.
        tolerance = 1e-8
    on_two_processes(compare, SHARDABLE[name], expected, micro_batches, tolerance)


def refused(product: Product) -> None:
    distributed.init_process_group("gloo")
    setting = Setting()
    setting.shard()
    with pytest.raises(ConfigurationError, match=r"needs second derivatives.*use `FiniteDifference` as the `product`"):
        Neumann(product=product)(setting.problem(torch.arange(4), torch.optim.SGD(setting.layers.parameters(), lr=0.1)))


@pytest.mark.parametrize("product", [each for each in exported(Product) if not each.supports_sharding])
def test_exact_products_of_sharded_models_are_refused_by_name(product):
    on_two_processes(refused, product())


def test_estimators_say_whether_they_support_sharding():
    assert all(make().supports_sharding for make in SHARDABLE.values())
    exact = [Neumann(), Chebyshev(), Unrolled(), SAMA(product=DoubleBackward()), Nystrom(product=FiniteDifference())]
    assert not any(estimator.supports_sharding for estimator in exact)
