"""A module that has been trained, tested or tried out before: its next run is that of a new module with its weights."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner

from diopt_lightning.bilevel import Chebyshev, FiniteDifference, Unrolled
from tests.estimators import Claim, claiming
from tests.helpers import quiet_trainer
from tests.test_bilevel_module import HyperCleaning, loaders

pytestmark = pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")

SETTINGS = claiming(Claim.GUARANTEES)


class Tried(HyperCleaning):
    """Ends in the middle of a round, and of an inner step, after 5 batches; can be tested."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"inner_steps": 3, "inner_accumulation": 2, "outer_accumulation": 2} | options))
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return loaders(self.batch_size)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.outer_loss(batch))


def state_of(module: Tried) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    return {name: value for name, value in checkpoint["bilevel"].items() if name != "estimator"}


def assert_same(found: Tried, expected: Tried) -> None:
    """Bitwise the same weights, and the same state of a run."""
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    torch.testing.assert_close(state_of(found), state_of(expected), rtol=0, atol=0)


def like(module: Tried, **options: Any) -> Tried:
    """A new module with the weights of another one."""
    new = Tried(**options)
    new.load_state_dict(module.state_dict())
    return new


def fit(module: Tried, batches: int, data: Any = None, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=batches)
    trainer.fit(module, data or loaders(), **options)
    return trainer


@pytest.mark.parametrize("name", SETTINGS)
def test_the_next_run_is_that_of_a_new_module_with_the_same_weights(name, tmp_path):
    def options() -> dict[str, Any]:
        return {"hypergradient": SETTINGS[name]()}

    module = Tried(**options())
    first = fit(module, batches=6)
    first.save_checkpoint(tmp_path / "first.ckpt")
    fit(module, batches=5)
    new = like(module, **options())
    module.weights.grad = torch.ones_like(module.weights)  # of a backward pass of the user's own
    quiet_trainer().test(module, loaders()["outer"], verbose=False)
    for each in (module, new):
        assert fit(each, batches=6).global_step == each.inner_steps_taken == 3
        assert each.outer_steps_taken == 1
    assert_same(module, new)
    new = Tried(**options())
    for each in (module, new):
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(each, loaders(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
        assert trainer.global_step == each.inner_steps_taken == 6
    assert_same(module, new)


def test_a_loaded_module_that_is_trained_on_begins_a_run(tmp_path):
    fit(Tried(), batches=5).save_checkpoint(tmp_path / "first.ckpt")
    loaded = Tried.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=True)
    assert loaded.inner_steps_taken == 2
    new = like(loaded)
    for each in (loaded, new):
        fit(each, batches=6)
    assert_same(loaded, new)


def test_an_estimator_that_another_module_had_begins_anew():
    used = Chebyshev(warm_start=True)
    fit(Tried(hypergradient=used), batches=6)
    module, new = Tried(hypergradient=used), Tried(hypergradient=Chebyshev(warm_start=True))
    for each in (module, new):
        fit(each, batches=6)
    assert_same(module, new)


def test_differences_are_checked_in_every_run():
    module = Tried(hypergradient=Chebyshev(products=2, product=FiniteDifference()))
    for _ in range(2):
        assert "hypergradient/finite_difference_error" in fit(module, batches=6).callback_metrics


def test_a_run_after_the_search_for_a_batch_size_is_that_of_a_new_module():
    found, new = Tried(hypergradient=Unrolled(2)), Tried(hypergradient=Unrolled(2))
    fit(found, batches=5)
    found.load_state_dict(new.state_dict())
    Tuner(quiet_trainer(max_epochs=1)).scale_batch_size(found, max_trials=2, steps_per_trial=1)
    assert found.inner_steps_taken == found.outer_steps_taken == 0
    found.batch_size = new.batch_size
    for each in (found, new):
        quiet_trainer(max_epochs=1, limit_train_batches=6).fit(each)
    assert_same(found, new)


def test_the_same_trainer_goes_on_with_its_run():
    module, trainer = Tried(inner_steps=2, inner_accumulation=1), quiet_trainer(max_epochs=1, limit_train_batches=3)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, loaders())
        assert trainer.global_step == module.inner_steps_taken == 3 * epochs
    assert module.outer_steps_taken == 3
