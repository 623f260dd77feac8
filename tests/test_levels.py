"""What each level has for itself: schedules, groups of parameters, several outer batches."""

from typing import Any

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from diopt_lightning import ConfigurationError, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.modules import LinearWithWarmup
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer
from tests.runs import data
from tests.test_bilevel_module import HyperCleaning, loaders


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def rates(schedule: Any, steps: int) -> list[float]:
    """The learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("warmup", "total"), [(0, 5), (3, 7), (4, 5)])
def test_the_linear_schedule_is_that_of_transformers(warmup, total):
    ours = LinearWithWarmup(sgd([torch.ones(1)]), warmup, total)
    theirs = get_linear_schedule_with_warmup(sgd([torch.ones(1)]), warmup, total)
    assert rates(ours, total + 2) == rates(theirs, total + 2)


@pytest.mark.parametrize(
    ("length", "inner_steps", "outer_steps"),
    [({"max_steps": 8}, 8, 4), ({"max_epochs": 2}, 6, 3), ({"max_epochs": 3, "max_steps": 7}, 7, 3)],
)
def test_a_linear_schedule_of_each_level_ends_with_the_run(length, inner_steps, outer_steps):
    made: list[LinearWithWarmup] = []

    def schedule(optimizer: Any) -> LinearWithWarmup:
        made.append(LinearWithWarmup(optimizer, warmup_steps=1))
        return made[-1]

    module = HyperCleaning(inner_steps=2, inner_accumulation=2, inner_scheduler=schedule, outer_scheduler=schedule)
    trainer = quiet_trainer(**length)
    trainer.fit(module, loaders())
    assert [each.total_steps for each in made] == [inner_steps, outer_steps]
    assert [each.last_epoch for each in made] == [trainer.global_step, module.outer_steps_taken]
    assert [each.last_epoch for each in made] == [inner_steps, outer_steps]
    assert [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups] == [0.0, 0.0]


def test_a_linear_schedule_of_a_resumed_run_is_as_long_as_the_run_it_is_given(tmp_path):
    def fit(**length: Any) -> list[float]:
        module = HyperCleaning(inner_optimizer=sgd, inner_scheduler=lambda optimizer: LinearWithWarmup(optimizer, 1))
        trainer = quiet_trainer(max_epochs=length.pop("epochs"))
        trainer.fit(module, loaders(), **length)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return [schedule.scheduler.total_steps for schedule in trainer.lr_scheduler_configs]

    assert fit(epochs=1) == [6]
    assert fit(epochs=2, ckpt_path=tmp_path / "saved.ckpt") == [12]


def test_a_linear_schedule_of_a_baseline_ends_with_the_run(blank_exemplars, tmp_path):
    module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), scheduler=LinearWithWarmup, max_new_tokens=3)
    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=3, limit_train_batches=4, limit_val_batches=0)
    trainer.fit(module, data(blank_exemplars, tmp_path))
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.total_steps == trainer.global_step == config.scheduler.last_epoch == 4


def test_a_schedule_that_cannot_know_its_end_is_refused():
    module = HyperCleaning(inner_scheduler=LinearWithWarmup)
    with pytest.raises(ConfigurationError, match=r"set its `total_steps`, or `trainer\.max_steps`"):
        quiet_trainer(max_time={"minutes": 1}).fit(module, loaders())
    with pytest.raises(ConfigurationError, match="`total_steps` of LinearWithWarmup must be 4 or more, got 3"):
        LinearWithWarmup(sgd([torch.ones(1)]), warmup_steps=3, total_steps=3)
    with pytest.warns(UserWarning, match=r"rises for 5 steps .* has 3 of its optimizer"):
        quiet_trainer(max_steps=3).fit(
            HyperCleaning(inner_scheduler=lambda optimizer: LinearWithWarmup(optimizer, 5)), loaders()
        )
