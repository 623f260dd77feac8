"""Sick training: values that are not finite, and hypergradients that explode."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from diopt_lightning import InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.bilevel import BilevelProblem, ConvergenceWarning, Hypergradient, HypergradientEstimator, Neumann
from diopt_lightning.cli import main
from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import TrainingError
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.modules.skipping import OuterNorms
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer
from tests.test_bilevel_module import HyperCleaning, InTurn, loaders
from tests.test_cli import small_run
from tests.test_text_modules import data


def poisoned(level: str, batch: int, value: float = float("nan")) -> dict[str, DataLoader]:
    """The loaders with one batch of 4 of one level, of the 6 of an epoch, that is not finite."""
    found = loaders()
    x, y, index = found[level].dataset.tensors
    x = x.clone()
    x[4 * batch] = value
    return found | {level: DataLoader(TensorDataset(x, y, index), 4)}


@pytest.mark.filterwarnings("ignore:Skipped")  # the first of the two
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_inner_step_that_is_not_finite_is_skipped_and_counted(accumulation, value):
    module = HyperCleaning(inner_steps=1, inner_accumulation=accumulation, outer_accumulation=accumulation)
    trainer = quiet_trainer(max_epochs=2)
    with pytest.warns(UserWarning, match=r"Skipped an inner step \(1 in a row, 2 in all\): the norm of the inner"):
        trainer.fit(module, poisoned("inner", 2, value))
    assert module._skipped.total == {"inner": 2, "outer": 0}
    steps = 12 // accumulation - 2
    assert module.inner_steps_taken == module.outer_steps_taken == trainer.global_step == steps
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert trainer.callback_metrics["skipped_inner_steps"] == 2


def test_the_steps_beside_a_skipped_one_are_those_of_a_run_without_its_batch():
    skipping, without = HyperCleaning(inner_steps=5), HyperCleaning(inner_steps=5)
    with pytest.warns(UserWarning, match="Skipped an inner step"):
        quiet_trainer(max_epochs=1).fit(skipping, poisoned("inner", 2))
    rows = torch.cat([torch.arange(8), torch.arange(12, 24)])
    kept = {
        level: DataLoader(TensorDataset(*(column[rows] for column in loader.dataset.tensors)), 4)
        for level, loader in loaders().items()
    }
    quiet_trainer(max_epochs=1).fit(without, kept)
    assert skipping.outer_steps_taken == 1
    assert all(torch.equal(a, b) for a, b in zip(skipping.parameters(), without.parameters(), strict=True))


def test_an_outer_step_that_is_not_finite_is_skipped_and_counted():
    module = HyperCleaning()
    with pytest.warns(UserWarning, match=r"Skipped an outer step .* it arose in the gradient of the outer loss"):
        quiet_trainer(max_epochs=1).fit(module, poisoned("outer", 3))
    assert module._skipped.total == {"inner": 0, "outer": 1}
    assert (module.inner_steps_taken, module.outer_steps_taken) == (6, 5)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_two_processes_skip_together():
    one, two = HyperCleaning(), HyperCleaning()
    data = InTurn()
    train = data.train_dataloader
    rows = poisoned("inner", 2)["inner"].dataset.tensors

    def with_poison() -> dict[str, DataLoader]:
        found = train()
        found["inner"].dataset.tensors = rows
        return found

    data.train_dataloader = with_poison
    with pytest.warns(UserWarning, match="Skipped"):
        quiet_trainer(max_epochs=1).fit(one, data)
    quiet_trainer(max_epochs=1, devices=2, strategy="ddp_fork").fit(two, data)  # one of them has the bad row
    torch.testing.assert_close(list(two.parameters()), list(one.parameters()), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Skipped")
def test_many_skipped_steps_in_a_row_end_the_run_and_name_the_last_checkpoint(tmp_path):
    class Sick(HyperCleaning):
        def inner_loss(self, batch: Any) -> Tensor:
            loss = super().inner_loss(batch)
            return loss * float("nan") if self.inner_steps_taken == 4 else loss

    module = Sick(skip_limit=3)
    every_two = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(max_steps=20, enable_checkpointing=True, callbacks=[every_two])
    expected = (
        r"3 steps in a row were skipped \(`skip_limit`\).* The last checkpoint is .*step=4.ckpt\. Lower the learning"
    )
    with pytest.raises(TrainingError, match=expected):
        trainer.fit(module, loaders())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:Skipped")
def test_the_command_line_says_so_in_one_line(tmp_path, capsys):
    arguments = small_run(tmp_path)
    assert main(["fit", *arguments, "--model.inner_optimizer.lr=1e30", "--model.skip_limit=2"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("diopt: error: 2 steps in a row were skipped")


def test_the_count_is_in_the_checkpoint(tmp_path: Path):
    trainer, module = quiet_trainer(max_epochs=1), HyperCleaning()
    with pytest.warns(UserWarning, match="Skipped"):
        trainer.fit(module, poisoned("inner", 5))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = HyperCleaning()
    quiet_trainer(max_epochs=2, limit_train_batches=0).fit(resumed, loaders(), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed._skipped.total == {"inner": 1, "outer": 0}
    assert resumed._skipped.in_a_row == 1


class SickBatches(InstructionTuning):
    """The baseline on the demo's tasks, with a loss that is not finite in some batches."""

    def __init__(self, sick: range, **options: Any) -> None:
        super().__init__(RandomSeq2Seq(dict(TINY_T5)), EmbedderDP(length=2), **options)
        self.sick = sick
        self.kept: list[list[Tensor]] = []

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> dict[str, Tensor]:
        self.kept.append([parameter.detach().clone() for parameter in self.parameters()])
        losses = super().training_step(batch, batch_idx)
        return losses | {"loss": losses["loss"] * (float("nan") if batch_idx in self.sick else 1.0)}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_baseline_skips_and_counts_as_well(clip, blank_exemplars, tmp_path):
    trainer, module = quiet_trainer(max_steps=5, gradient_clip_val=clip), SickBatches(range(2, 3))
    with pytest.warns(UserWarning, match=r"Skipped an inner step \(1 in a row, 1 in all\): the norm of the"):
        trainer.fit(module, data(blank_exemplars, tmp_path))
    same = [all(map(torch.equal, *pair)) for pair in pairwise(module.kept)]
    assert same == [False, False, True, False]
    assert trainer.callback_metrics["skipped_inner_steps"] == 1
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = SickBatches(range(0))
    again = quiet_trainer(max_steps=5)
    again.fit(resumed, data(blank_exemplars, tmp_path), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed._skipped.state_dict() == {"total": {"inner": 1, "outer": 0}, "in_a_row": 0}


@pytest.mark.filterwarnings("ignore:Skipped")
def test_the_baseline_ends_after_many_skipped_steps_in_a_row(blank_exemplars, tmp_path):
    module = SickBatches(range(2, 100), skip_limit=3)
    with pytest.raises(TrainingError, match=r"3 steps in a row were skipped \(`skip_limit`\)"):
        quiet_trainer(max_steps=20).fit(module, data(blank_exemplars, tmp_path))
    assert len(module.kept) == 5


class Exploding(HypergradientEstimator):
    """An estimator whose answer is a thousand times as large once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, problem: BilevelProblem) -> Hypergradient:
        self.calls += 1
        found = Neumann(terms=0, step_size=0.05)(problem)
        factor = 1000.0 if self.calls == 15 else 1.0
        return Hypergradient([factor * g for g in found.gradient], found.outer_loss, found.inner_loss)


def test_a_hypergradient_that_explodes_is_warned_of():
    with pytest.warns(
        ConvergenceWarning, match=r"The hypergradient's norm is .*, \d+ times its median over the last 14"
    ):
        quiet_trainer(max_steps=16).fit(HyperCleaning(hypergradient=Exploding()), loaders())
    norms = OuterNorms()
    for size in (1.0, 50.0, 0.01) * 20:  # no warning, which would be an error here
        norms.see(size)
