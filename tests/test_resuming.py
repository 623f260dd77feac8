"""Runs that are interrupted anywhere go on bitwise as if they had not been."""

import signal
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import BatchSizeFinder, LambdaCallback
from lightning.pytorch.trainer.connectors import signal_connector
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader

from diopt_lightning import ConfigurationError
from diopt_lightning.bilevel import Neumann, Unrolled
from diopt_lightning.callbacks import Interruption, OptimizerOptions, RandomState, UnfinishedValidation
from diopt_lightning.data.workers import ENDING
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.resuming import Interrupted, WholeCheckpoints, read_checkpoint
from tests.helpers import quiet_trainer
from tests.runs import data, optimization
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


class Everywhere(EveryBatch):
    """Saves at the ends of epochs and validations too."""

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "validated")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "end")

    def save(self, trainer: pl.Trainer, where: str) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx}-{where}.ckpt")


class Validations(pl.Callback):
    """Notes after which training batch each validation batch was computed."""

    def __init__(self, found: list[int]) -> None:
        self.found = found

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.found.append(trainer.fit_loop.total_batch_idx)


def fit(make: Any, *callbacks: Any, trainer: dict[str, Any] | None = None, **options: Any) -> pl.LightningModule:
    pl.seed_everything(0, verbose=False)
    module = make()
    rows = {level: Resumable(loader.dataset, 4) for level, loader in loaders().items()}
    defaults = {"max_epochs": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    options_of_the_trainer = defaults | (trainer or {})
    plugins = [WholeCheckpoints(), *options_of_the_trainer.pop("plugins", [])]
    quiet = quiet_trainer(**options_of_the_trainer, callbacks=[RandomState(), *callbacks], plugins=plugins)
    quiet.fit(module, rows, DataLoader(rows["outer"].dataset, 12), **options)
    return module


def assert_same(found: Any, expected: Any, where: Any) -> None:
    """Check that plain data and tensors are equal, and say which are not."""
    (values, structure), (wanted, structure_wanted) = (tree_flatten_with_path(each) for each in (found, expected))
    assert structure == structure_wanted, where
    for (path, value), (_, other) in zip(values, wanted, strict=True):
        equal = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        assert equal, (where, keystr(path), value, other)


def quick_ones(names: Iterable[str], *quick: str) -> list[Any]:
    """All names, those that are not quick marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


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
@pytest.mark.parametrize("name", quick_ones(MODULES, "accumulated", "unrolled"))
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


VALIDATIONS = {
    "inside": {"val_check_interval": 2, "limit_train_batches": 5},
    "inside_and_at_the_end": {"val_check_interval": 3},
    "at_the_end": {"val_check_interval": 1.0},
    "never": {"val_check_interval": 1.0, "limit_val_batches": 0},
    "every_other_epoch": {"val_check_interval": 1.0, "check_val_every_n_epoch": 2},
    "across_epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None, "limit_train_batches": 5},
    "steps": {"val_check_interval": 2, "limit_train_batches": 5, "max_steps": 18, "max_epochs": -1},
}


def state_of_a_run(path: Any) -> dict[str, Any]:
    content = read_checkpoint(path)
    return {
        part: content[part] for part in ("state_dict", "optimizer_states", "bilevel", "loops", "global_step", "epoch")
    }


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize(
    ("name", "places"),
    [
        *((name, "some") for name in ("inside_and_at_the_end", "never", "across_epochs", "steps")),
        *(pytest.param(name, "all", marks=pytest.mark.slow) for name in VALIDATIONS),
    ],
)
def test_all_that_a_resumed_run_saves_is_what_the_whole_run_saved(name, places, tmp_path):
    """Weights and counters alike, so that what goes on from there goes on right: any number of interruptions."""

    def run(folder: Any, **options: Any) -> dict[str, Any]:
        everywhere = Everywhere(folder)
        module = fit(MODULES["one_by_one"], UnfinishedValidation(), everywhere, trainer=VALIDATIONS[name], **options)
        module.trainer.save_checkpoint(tmp_path / "ended.ckpt")
        # Where nothing was left to train, Lightning leaves its counters as they were saved.
        trained = ("state_dict", "optimizer_states", "bilevel", "global_step")
        return {part: state_of_a_run(tmp_path / "ended.ckpt")[part] for part in trained}

    whole = tmp_path / "whole"
    ended = run(whole)
    last = f"{VALIDATIONS[name].get('limit_train_batches', 6) - 1}"  # the last batch of the first epoch
    for path in whole.glob(f"{last}*.ckpt" if places == "some" else "*.ckpt"):
        assert_same(run(tmp_path / path.name, ckpt_path=path, weights_only=True), ended, path.name)
        for found in (tmp_path / path.name).glob("*.ckpt"):
            assert_same(state_of_a_run(found), state_of_a_run(whole / found.name), (path.name, found.name))


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_a_run_that_has_lost_count_of_its_epochs_finds_it_again(tmp_path):
    whole = fit(MODULES["one_by_one"], EveryBatch(tmp_path))
    content = read_checkpoint(tmp_path / "7.ckpt")
    for counts in content["loops"]["fit_loop"]["epoch_progress"].values():  # as Lightning leaves them when it resumes
        counts.update(ready=1, started=1)
    torch.save(content, tmp_path / "lost.ckpt")
    resumed = fit(MODULES["one_by_one"], UnfinishedValidation(), ckpt_path=tmp_path / "lost.ckpt", weights_only=True)
    assert resumed.inner_steps_taken == whole.inner_steps_taken
    assert_same(resumed.state_dict(), whole.state_dict(), "lost")


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_a_round_that_was_dealt_to_other_processes_is_refused_and_what_works_is_said(tmp_path):
    fit(MODULES["one_by_one"], EveryBatch(tmp_path), trainer={"max_epochs": 1})
    for number in range(3, 6):  # of a round of three steps, whose last two pairs are used again
        content = read_checkpoint(tmp_path / f"{number}.ckpt")
        content["bilevel"]["round"] *= 2  # as of two processes
        torch.save(content, tmp_path / f"{number}-of-two.ckpt")
    for works in (3, 5):
        fit(MODULES["one_by_one"], ckpt_path=tmp_path / f"{works}-of-two.ckpt", weights_only=True)
    with pytest.raises(ConfigurationError, match=r"dealt to 2 process.*go on with 2, or .* is a multiple of 3, or 1"):
        fit(MODULES["one_by_one"], ckpt_path=tmp_path / "4-of-two.ckpt", weights_only=True)


class Batches(pl.Callback):
    """Notes the instances of every batch, by the number of the batch, and asks for loaders of its own."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Any]] = {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        at = trainer.fit_loop.total_batch_idx
        self.seen[at] = [(each.task.tolist(), each.instance.tolist()) for each in batch.values()]
        next(iter(trainer.datamodule.train_dataloader()["inner"]))  # type: ignore[attr-defined]


def test_loaders_that_are_made_anew_go_on_and_those_of_another_run_begin(blank_exemplars, tmp_path):
    def batches(every: int, rows: Any, **options: Any) -> dict[int, list[Any]]:
        seen, saving = Batches(), [] if options or every else [EveryBatch(tmp_path)]
        trainer = quiet_trainer(
            max_epochs=3,
            reload_dataloaders_every_n_epochs=every,
            limit_val_batches=0,
            callbacks=[seen, *saving, UnfinishedValidation()],
        )
        trainer.fit(optimization(EmbedderDP(length=2)), rows, **options)
        return seen.seen

    rows = data(blank_exemplars, tmp_path)
    expected = batches(0, rows)
    in_epoch = len(expected) // 3
    assert len({str(batch) for batch in expected.values()}) == len(expected)
    assert batches(1, rows) == expected
    for number in (in_epoch - 1, in_epoch):
        resumed = batches(1, data(blank_exemplars, tmp_path), ckpt_path=tmp_path / f"{number}.ckpt", weights_only=True)
        assert resumed == {at: batch for at, batch in expected.items() if at > number}


def test_a_search_for_a_batch_size_leaves_the_streams_at_their_beginning(blank_exemplars, tmp_path):
    size, runs = 2, []
    for finders in ([BatchSizeFinder(init_val=2, max_trials=1, steps_per_trial=2)], []):
        rows, seen = data(blank_exemplars, tmp_path, batch_size=size), Batches()
        trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[*finders, seen])
        trainer.fit(optimization(EmbedderDP(length=2)), rows)
        size = rows.batch_size
        runs.append(seen.seen)
    assert runs[0] == runs[1]


SLURM = {"NTASKS": "1", "JOB_NAME": "job", "JOB_ID": "7", "NNODES": "1", "NTASKS_PER_NODE": "1"}
SLURM |= dict.fromkeys(("PROCID", "LOCALID", "NODEID"), "0")


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize(
    ("number", "asks_slurm"), [(number, False) for number in ENDING] + [(signal.SIGUSR1, True), (signal.SIGCONT, True)]
)
def test_whatever_signal_ends_a_run_ends_it_between_steps(number, asks_slurm, tmp_path, monkeypatch):
    class Told(Everything):
        outer_losses = 0

        def outer_loss(self, batch: Any) -> Tensor:
            self.outer_losses += 1
            if self.outer_losses == 3:
                signal.raise_signal(number)
            return super().outer_loss(batch)

    asked: list[Any] = []
    where: dict[str, Any] = {"default_root_dir": tmp_path, "max_epochs": 2}
    whole = fit(MODULES["one_by_one"], trainer=where)
    if asks_slurm:
        for name, value in SLURM.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setattr(signal_connector, "call", lambda command: asked.append(command) or 0)
        environment = SLURMEnvironment(requeue_signal=number)
    if signal.getsignal(number) == signal.SIG_IGN:  # as under `nohup`, which a run heeds
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        fit(
            lambda: Told(inner_steps=3, outer_accumulation=2),
            UnfinishedValidation(),
            Interruption(),
            trainer=where | ({"plugins": [environment]} if asks_slurm else {}),
        )
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    (path,) = tmp_path.rglob("*.ckpt")
    assert asked == ([["scontrol", "requeue", "7"]] if asks_slurm else [])
    # SLURM starts the same command again, and Lightning finds the checkpoint.
    resumed = fit(
        MODULES["one_by_one"], trainer=where, **({} if asks_slurm else {"ckpt_path": path}), weights_only=True
    )
    assert resumed.inner_steps_taken == whole.inner_steps_taken
    assert_same(resumed.state_dict(), whole.state_dict(), path)


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
