"""Training that is of no use is said: parameters that stay as they are, and rounds that never end."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diopt_lightning.bilevel import Identity, Neumann, Unrolled
from tests.helpers import quiet_trainer
from tests.test_bilevel_module import HyperCleaning, loaders


class Spare(HyperCleaning):
    """Has parameters at both levels that no loss depends on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pooler, self.unused = nn.Linear(2, 2).double(), nn.Parameter(torch.ones(3).double())

    def outer_parameters(self) -> list[nn.Parameter]:
        return [self.weights, self.unused]


def said(module: HyperCleaning, **options: Any) -> list[str]:
    """What a run of a module warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(**options)
        trainer.fit(module, loaders(batch_size=2))
    words = ("had a gradient of zero", "are what they were after", "takes no outer step", "No outer step was taken")
    return [str(each.message) for each in caught if any(word in str(each.message) for word in words)]


@pytest.mark.parametrize("steps", [2, 12])
def test_parameters_that_no_loss_reaches_are_said_once(steps):
    inner, outer = sorted(said(Spare(), max_steps=steps))
    assert inner.startswith("1 of 2 outer parameters, such as `unused`, had a gradient of zero in all of")
    assert outer.startswith("2 of 6 inner parameters, such as `pooler.weight`, had a gradient of zero in all of")
    assert said(HyperCleaning(), max_steps=steps) == []


def test_outer_parameters_of_which_none_is_reached_are_said_at_once():
    class Alone(Spare):
        def outer_parameters(self) -> list[nn.Parameter]:
            return [self.unused]

    trainer = quiet_trainer(max_steps=1)
    with pytest.warns(UserWarning, match="1 of 1 outer parameters.* in all of 1 outer step: neither loss depends"):
        trainer.fit(Alone(inner_steps=1), loaders())


class Half(HyperCleaning):
    """Parameters in bfloat16, all but none of which are zero."""

    def __init__(self, rate: float, **options: Any) -> None:
        adam = {f"{level}_optimizer": lambda p: torch.optim.Adam(p, lr=rate) for level in ("inner", "outer")}
        super().__init__(hypergradient=Identity(), **adam, **options)
        self.to(torch.bfloat16)
        self.weights.data.fill_(1.0)

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss([batch[0].bfloat16(), batch[1].bfloat16(), batch[2]])

    def outer_loss(self, batch: Any) -> Tensor:
        return super().outer_loss([batch[0].bfloat16(), batch[1].bfloat16(), batch[2]])


def test_steps_that_are_lost_in_rounding_are_said():
    inner, outer = sorted(said(Half(rate=1e-5), max_steps=12), key=lambda message: "outer" in message)
    for message, level in ((inner, "inner"), (outer, "outer")):
        assert f"of the entries of {level} parameters that have a gradient, of half precision, are what" in message
        assert "a learning rate of 1e-05 moves them by less than their precision" in message
    assert said(Half(rate=1e-2), max_steps=12) == []


def test_a_learning_rate_of_zero_is_said():
    still = {"outer_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    (message,) = said(HyperCleaning(**still), max_steps=12)
    assert message.startswith("100% of the entries of outer parameters")


@pytest.mark.parametrize(
    ("module", "trainer", "inner_steps"),
    [
        ({"inner_steps": 20}, {"max_steps": 4}, 4),
        ({"inner_steps": 7, "inner_accumulation": 2}, {"max_epochs": 1}, 6),
        ({"inner_steps": 5}, {"max_epochs": 2, "limit_train_batches": 2}, 4),
    ],
)
def test_a_run_without_an_outer_step_is_told_so_before_and_after(module, trainer, inner_steps):
    before, after = said(HyperCleaning(**module), **trainer)
    assert before.startswith(f"This run takes no outer step: it has {inner_steps} inner steps, and the first outer one")
    assert after.startswith("No outer step was taken (no round of `inner_steps` was completed)")


def test_a_run_whose_outer_steps_were_all_skipped_is_told_so_after():
    class Sick(HyperCleaning):
        def outer_loss(self, batch: Any) -> Tensor:
            return super().outer_loss(batch) * float("nan")

    (message,) = said(Sick(), max_steps=2)
    assert message.startswith("No outer step was taken (2 were skipped)")


def test_a_run_that_goes_on_counts_the_steps_before(tmp_path):
    trainer = quiet_trainer(max_steps=5)
    trainer.fit(HyperCleaning(inner_steps=4), loaders())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = HyperCleaning(inner_steps=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*outer step.*")
        quiet_trainer(max_steps=6).fit(resumed, loaders(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("estimator", [Neumann(step_size=0.05), Unrolled(5)])
def test_a_trial_takes_one_outer_step(batches, accumulation, estimator):
    module = HyperCleaning(
        inner_steps=20, inner_accumulation=accumulation, outer_accumulation=2, hypergradient=estimator
    )
    assert said(module, fast_dev_run=batches) == []
    assert (module.inner_steps_taken, module.outer_steps_taken) == (batches if accumulation == 1 else 1, 1)
    assert module.weights.abs().sum() > 0
