"""Runs that are interrupted anywhere go on bitwise as if they had not been."""

from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diopt_lightning.bilevel import Neumann, Unrolled
from diopt_lightning.callbacks import OptimizerOptions, RandomState, UnfinishedValidation
from diopt_lightning.resuming import WholeCheckpoints
from tests.helpers import quiet_trainer
from tests.test_bilevel_module import HyperCleaning, loaders


class Resumable(DataLoader):
    """Goes on with the batch at which a checkpoint was written."""

    handed_out = 0

    def __iter__(self) -> Any:
        rows = list(super().__iter__())
        while True:
            self.handed_out += 1
            yield rows[(self.handed_out - 1) % len(rows)]

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.handed_out = state["handed_out"]


class Everything(HyperCleaning):
    """Draws random numbers of every kind, and has running means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dropout=0.3, **options)
        self.means = nn.BatchNorm1d(4).double()

    def inner_loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        return super().inner_loss((self.means(x) * (1 + numpy.random.rand() / 10), y, index))  # noqa: NPY002

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(3)  # what validation draws is no matter


class EveryBatch(pl.Callback):
    """Saves after every batch, whether or not a step was taken."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx}.ckpt")


class Validations(pl.Callback):
    """Notes after which training batch each validation batch was computed."""

    def __init__(self, found: list[int]) -> None:
        self.found = found

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found.append(trainer.fit_loop.total_batch_idx)


def fit(make: Any, *callbacks: Any, devices: int = 1, **options: Any) -> pl.LightningModule:
    module = make()
    rows = {level: Resumable(loader.dataset, 4) for level, loader in loaders().items()}
    trainer = quiet_trainer(
        max_epochs=4,
        val_check_interval=2,
        num_sanity_val_steps=0,
        callbacks=[RandomState(), *callbacks],
        devices=devices,
        plugins=[WholeCheckpoints()],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, rows, DataLoader(rows["outer"].dataset, 12), **options)
    return module


MODULES = {
    "accumulated": lambda: Everything(inner_steps=2, inner_accumulation=3, outer_accumulation=5),
    "one_by_one": lambda: Everything(inner_steps=3, outer_accumulation=2),
    "unrolled": lambda: Everything(hypergradient=Unrolled(steps=3), inner_steps=2, inner_accumulation=2),
    "unrolled_less": lambda: Everything(hypergradient=Unrolled(steps=2), inner_steps=4),
    "schedules": lambda: Everything(
        hypergradient=Neumann(terms=2),
        inner_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=24),
        outer_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5),
        inner_steps=2,
    ),
}


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("name", MODULES)
def test_a_checkpoint_after_any_batch_holds_all_of_an_unfinished_round(name, tmp_path):
    validated: dict[int, list[int]] = {-1: []}
    whole = fit(MODULES[name], EveryBatch(tmp_path), UnfinishedValidation(), Validations(validated[-1]))
    batches = len(list(tmp_path.glob("*.ckpt")))
    assert batches == 24
    for number in range(batches):
        validated[number] = []
        after = (UnfinishedValidation(), Validations(validated[number]))
        resumed = fit(MODULES[name], *after, ckpt_path=tmp_path / f"{number}.ckpt", weights_only=True)
        assert validated[number] == [batch for batch in validated[-1] if batch >= number]
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), (number, key)


def test_a_learning_rate_that_is_changed_counts_and_is_said_once(tmp_path, capfd):
    def make(lr: float) -> Everything:
        return Everything(outer_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr))

    fit(lambda: make(0.1), EveryBatch(tmp_path), OptimizerOptions())
    capfd.readouterr()
    seen: list[float] = []
    note = LambdaCallback(on_train_start=lambda trainer, _: seen.append(trainer.optimizers[1].param_groups[0]["lr"]))
    fit(lambda: make(0.2), OptimizerOptions(), note, ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    assert seen == [0.2]
    said = [line for line in capfd.readouterr().err.splitlines() if "in the checkpoint" in line]
    assert said == ["diopt: `group 1 of optimizer 2: lr` is 0.2 and was 0.1 in the checkpoint: it is changed."]
