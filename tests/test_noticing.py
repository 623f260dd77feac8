"""What losses log, and change in metrics and buffers, counts once, however often a solver evaluates them."""

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.wrappers import Running

from diopt_lightning.bilevel import Chebyshev, FiniteDifference, Hypergradient, HypergradientEstimator, Neumann
from tests.estimators import Claim, claiming
from tests.helpers import quiet_trainer
from tests.test_bilevel_module import HyperCleaning, Logged, loaders


class Curious(HypergradientEstimator):
    """Evaluates the losses of inner steps too, in training mode."""

    def observe(self, problem: Any) -> None:
        for loss, _ in [*problem.inner_parts(), *problem.outer_parts()]:
            loss()

    def __call__(self, problem: Any) -> Hypergradient:
        return Neumann(step_size=0.05)(problem)


class Measured(HyperCleaning):
    """Measures where it computes losses, in every way that there is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.insert(0, nn.BatchNorm1d(4).double())
        self.rows = SumMetric()
        self.both = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("moved", torch.zeros(()))

    def measure(self, level: str, batch: Any) -> None:
        self.replaced = self.replaced + 1
        self.moved += 1
        if level == "inner":
            self.rows.update(len(batch[0]))
            self.log("inner_rows", self.rows, on_step=False, on_epoch=True)
        else:
            self.both.update(len(batch[0]))
            self.log_dict(self.both, on_step=False, on_epoch=True)
        self.logger.log_metrics({f"direct/{level}": 1.0})
        self.loggers[0].log_metrics({f"direct/{level}": 1.0})

    def inner_loss(self, batch: Any) -> Tensor:
        self.measure("inner", batch)
        return super().inner_loss(batch)

    def outer_loss(self, batch: Any) -> Tensor:
        self.measure("outer", batch)
        return super().outer_loss(batch)


SETTINGS = claiming(Claim.GUARANTEES) | {
    "differences": lambda: Chebyshev(product=FiniteDifference()),
    "curious": Curious,
}


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
def test_only_the_evaluations_of_training_steps_and_the_first_outer_one_count(make, tmp_path):
    module, logger = Measured(hypergradient=make(), inner_steps=2), Logged(tmp_path)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=4, logger=logger)
    trainer.fit(module, loaders())
    assert (module.inner_steps_taken, module.outer_steps_taken) == (4, 2)
    found = {name: trainer.callback_metrics[name].item() for name in ("inner_rows", "sum", "mean")}
    assert found == {"inner_rows": 16, "sum": 8, "mean": 4}
    assert (module.replaced, module.moved, module.model[0].num_batches_tracked) == (6, 6, 4)
    direct = [name for row in logger.rows for name in row if name.startswith("direct")]
    assert (direct.count("direct/inner"), direct.count("direct/outer")) == (8, 4)


def test_every_evaluation_starts_from_the_same_state():
    class Drifting(HyperCleaning):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))
            self.attribute = torch.ones((), dtype=torch.float64)
            self.generator, self.rows = torch.Generator(), Running(SumMetric(), window=2)

        def inner_loss(self, batch: Any) -> Tensor:
            self.scale *= 1.5
            self.attribute *= 1.5
            drawn = random.random() + numpy.random.random() + torch.rand((), generator=self.generator)  # noqa: NPY002
            factor = self.scale * self.attribute * self.rows(1.0) * self.rows.compute() * drawn
            return factor * super().inner_loss(batch)

    module = Drifting()
    problem = module.problem([next(iter(loaders()["inner"]))], next(iter(loaders()["outer"])))
    (loss, _), *_ = problem.inner_parts()
    values = [loss() for _ in range(3)]
    assert values[0] == values[1] == values[2]
    values[0].backward()  # of a graph whose buffer was not changed behind its back
    assert module.scale == module.attribute == 1
    assert module.rows._computed is None
    assert module.rows._num_vals_seen == 0
