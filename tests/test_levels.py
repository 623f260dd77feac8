"""What each level has for itself: schedules, groups of parameters, several outer batches."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_linear_schedule_with_warmup

from diopt_lightning import ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.callbacks import RandomState
from diopt_lightning.instructions import CandidatePool, Composition, EmbedderDP, ExtractorIC
from diopt_lightning.modules import LinearWithWarmup, ParameterGroup
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer
from tests.runs import Moved, data, optimization
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


NO_DECAY = ParameterGroup({"weight_decay": 0.0}, vectors=True)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad", "Adafactor", "NAdam", "RMSprop", "Adadelta"])
def test_norms_and_biases_without_weight_decay_stay_where_they_have_no_gradient(optimizer):
    def fit(groups: list[ParameterGroup] | None) -> tuple[HyperCleaning, torch.optim.Optimizer]:
        made = getattr(torch.optim, optimizer)
        module = HyperCleaning(
            inner_optimizer=lambda parameters: made(parameters, lr=0.5, weight_decay=0.5), inner_groups=groups
        )
        module.weights.data.fill_(-torch.inf)  # the inner loss is zero: weight decay alone moves anything
        module.weights.requires_grad_(False)
        module.outer_parameters = lambda: [module.unused]  # type: ignore[method-assign]
        module.unused = torch.nn.Parameter(torch.zeros(1).double())
        quiet_trainer(max_steps=1).fit(module, loaders())
        return module, module.optimizers(use_pl_optimizer=False)[0]

    before = HyperCleaning()
    module, made = fit([NO_DECAY])
    assert [[p.dim() for p in group["params"]] for group in made.param_groups] == [[2, 2], [1, 1]]
    for now, then in zip(module.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(now, then) == (now.dim() == 1)
    plain, made = fit(None)
    assert len(made.param_groups) == 1
    assert not any(
        torch.equal(now, then) for now, then in zip(plain.model.parameters(), before.model.parameters(), strict=True)
    )


def both_forms() -> Composition:
    """A bilinear form, and free vectors."""
    return Composition([ExtractorIC(3, 32, pool=CandidatePool(instances=False)), EmbedderDP(length=2)])


BILINEAR, VECTORS = "instruction.parts.0.bilinear", "instruction.parts.1.weight"


def names_in_groups(trainer: Any, module: Any, number: int = 0) -> list[tuple[float, set[str]]]:
    """The learning rate and the parameters' names of each group of an optimizer."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [(group["lr"], {names[p] for p in group["params"]}) for group in trainer.optimizers[number].param_groups]


def test_bilinear_forms_have_a_learning_rate_of_their_own_or_are_learned_alone(blank_exemplars, tmp_path):
    module, trainer = optimization(both_forms()), quiet_trainer(max_steps=2, limit_val_batches=0)
    module.outer_level.groups = [ParameterGroup({"lr": 0.5}, ["*bilinear*"])]
    trainer.fit(module, data(blank_exemplars, tmp_path))
    assert names_in_groups(trainer, module, 1) == [(0.1, {VECTORS}), (0.5, {BILINEAR})]

    module, tasks = optimization(both_forms()), data(blank_exemplars, tmp_path)
    module.outer_level.groups = [ParameterGroup({"lr": 0.5}, ["*bilinear*"]), ParameterGroup(learned=False)]
    moving = Moved()
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0, callbacks=[moving])
    trainer.fit(module, tasks)
    assert names_in_groups(trainer, module, 1) == [(0.5, {BILINEAR})]
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, moving.before[name])}
    assert BILINEAR in moved
    assert VECTORS not in moved
    assert any(name.startswith("backbone.") for name in moved)


def test_phi_is_learned_alone_by_a_baseline_and_keeps_its_learning_rate(blank_exemplars, tmp_path):
    groups = [ParameterGroup({"lr": 0.5}, [BILINEAR]), ParameterGroup({}, ["backbone.*"], learned=False)]
    module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), both_forms(), groups=groups, max_new_tokens=3)
    moving = Moved()
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0, callbacks=[moving])
    trainer.fit(module, data(blank_exemplars, tmp_path))
    assert names_in_groups(trainer, module) == [(0.01, {VECTORS}), (0.5, {BILINEAR})]
    distances = moving.distances(module)
    assert distances["instruction"] > 0 == distances["backbone"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (ParameterGroup({"weight_decy": 0.0}), "has `weight_decy`, which Adam does not: it has amsgrad, betas"),
        (ParameterGroup({"lr": "fast"}), r"`inner_groups\[0\].options.lr` must be a number from 0 on, got 'fast'"),
        (ParameterGroup({}, ["*.nothing"]), r"has no parameter that is in no group .* like `model.0.weight` and"),
    ],
)
def test_groups_that_cannot_be_are_named(group, message):
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(max_steps=1).fit(HyperCleaning(inner_groups=[group]), loaders())


def other_loader() -> DataLoader:
    """Other rows of the outer level."""
    return DataLoader(TensorDataset(torch.randn(24, 4).double(), torch.randn(24, 1).double(), torch.arange(24)), 3)


def still(**options: Any) -> HyperCleaning:
    """A module whose inner parameters stay, and whose outer ones move by their hypergradient."""
    return HyperCleaning(
        inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        outer_optimizer=sgd,
        outer_gradient_clip=None,
        **options,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_hypergradient_is_that_of_the_mean_loss_of_several_outer_batches(micro_batches):
    levels = loaders()
    outer = [levels["outer"], other_loader()]
    module = still(outer_batches=2, micro_batches=micro_batches)
    plain = still()
    inner, *several = (next(iter(loader)) for loader in (levels["inner"], *outer))
    expected = sum(plain.estimate_hypergradient(inner, batch).gradient[0] for batch in several) / 2
    quiet_trainer(max_steps=1).fit(module, {"inner": levels["inner"], "outer": outer})
    torch.testing.assert_close(plain.weights.detach() - module.weights.detach(), expected, rtol=1e-9, atol=0)
    assert expected.norm() > 1e-4


def test_a_run_with_several_outer_batches_goes_on_in_the_middle_of_a_round(tmp_path, blank_exemplars):
    def fit(steps: int, **options: Any) -> InstructionOptimization:
        module = optimization(EmbedderDP(length=2))
        module.outer_batches = 3
        torch.manual_seed(0)
        trainer = quiet_trainer(max_steps=steps, limit_val_batches=0, callbacks=[RandomState()])
        trainer.fit(module, data(blank_exemplars, tmp_path, outer_batch_size=2), **options)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole = fit(8)
    fit(3)
    resumed = fit(8, ckpt_path=tmp_path / "3.ckpt")
    assert resumed.outer_steps_taken == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_data_module_gives_as_many_outer_batches_as_the_module_asks_for(blank_exemplars, tmp_path):
    module = optimization(EmbedderDP(length=2))
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, data(blank_exemplars, tmp_path, outer_batch_size=2))
    trainer.fit_loop._combined_loader = None  # as a new run begins: from the beginning, not where this one has come to
    single = iter(trainer.datamodule.train_dataloader()["outer"])
    module.outer_batches = 3
    for _, batches in zip(range(4), trainer.datamodule.train_dataloader()["outer"], strict=False):
        assert len(batches) == 3
        for batch in batches:
            assert all(torch.equal(a, b) for a, b in zip(batch, next(single), strict=True))


def test_outer_batches_that_are_not_there_are_named():
    with pytest.raises(ConfigurationError, match=r"`outer_batches` is 2, and a step is given 3 in a \w+: pass"):
        quiet_trainer(max_steps=1).fit(HyperCleaning(outer_batches=2), loaders())
