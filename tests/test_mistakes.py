"""What a user can mend ends as one sentence, whoever notices it; a bug keeps its traceback."""

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from diopt_lightning import InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.cli import main
from diopt_lightning.data import BlankExemplarsDataModule
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.modules import InstructionOptimization
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer
from tests.runs import data, optimization
from tests.test_cli import small_run
from tests.test_strangers import one_sentence

CALLBACKS = "lightning.pytorch.callbacks"


def callbacks(name: str, **options: Any) -> str:
    return f"--trainer.callbacks={json.dumps([{'class_path': name, 'init_args': options}])}"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.accelerator=tpu", "torch_xla"),
        ("--trainer.accelerator=nonsense", "`accelerator='nonsense'`"),
        ("--trainer.devices=0", "`Trainer(devices='0')`"),
        ("--trainer.devices=abc", "should be an int > 0"),  # a TypeError, raised on purpose
        ("--trainer.strategy=nonsense", "`strategy='nonsense'`"),
        ("--trainer.limit_train_batches=2.5", "limit_train_batches"),
        ("--trainer.max_time=abc", "not a valid duration"),
        ("--trainer.logger=lightning.pytorch.loggers.WandbLogger", "pip install"),
        ("--trainer.gradient_clip_val=0.5", "set `model.inner_gradient_clip`"),
        ("--trainer.accumulate_grad_batches=3", "set `model.inner_accumulation`"),
        ("--model.inner_optimizer.lr=-1", "Invalid learning rate: -1.0"),
        ("--model.inner_optimizer.betas=[2, 3]", "Invalid beta parameter"),
        ("--model.inner_scheduler=torch.optim.lr_scheduler.OneCycleLR", "`model.inner_scheduler"),
        ("--model.inner_scheduler=transformers.get_linear_schedule_with_warmup", "`model.inner_scheduler`: Expected"),
        ("--data.test_prompt=[{definition: true}]", "`data`: Option 'test_prompt' is not accepted"),
        ("--data.tasks={exemplars: a}", "Expected a <class 'int'>. Got value: a"),
        ("--model.backbone.config={model_type: nonsense}", "makes no encoder-decoder model"),
        ("--model.backbone.config={model_type: t5, num_heads: 0}", "makes no encoder-decoder model"),
        ("--nonsense=1", "unrecognized arguments: --nonsense=1"),
        ("--config=nowhere.yaml", "`config`: File does not exist"),
        ("--ckpt_path=best", "There is no checkpoint in"),
        ("--ckpt_path=hpc", "no HPC checkpoint was found"),
        (callbacks(f"{CALLBACKS}.EarlyStopping", monitor="nonsense"), "`nonsense` which is not available"),
        (callbacks(f"{CALLBACKS}.EarlyStopping"), "monitor"),
        (callbacks(f"{CALLBACKS}.GradientAccumulationScheduler", scheduling={0: 2}), "set `model.inner_accumulation`"),
        (callbacks(f"{CALLBACKS}.LearningRateFinder"), "compare short runs"),
        (callbacks(f"{CALLBACKS}.StochasticWeightAveraging", swa_lrs=0.1), "take `WeightAveraging`"),
        (callbacks(f"{CALLBACKS}.BackboneFinetuning"), "`model.backbone.inner_parameters`"),
    ],
)
def test_a_mistake_that_a_library_notices_is_one_sentence(argument, message, tmp_path, capfd):
    arguments = [*small_run(tmp_path), "--trainer.max_epochs=1", "--test_after_fit=false", argument]
    assert main(["fit", *arguments]) == 2
    line = one_sentence(capfd.readouterr().err)
    assert message in line
    assert len(line) < 900


class Buggy(Callback):
    """A callback of a user's own."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ValueError("a bug of the user's own")


def raises(*_: Any, **__: Any) -> None:
    raise RuntimeError("a bug of ours")


def misuses_lightning(self: LightningModule) -> None:
    self.log("a name", "no number")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "name", "bug"),
    [
        (BlankExemplarsDataModule, "prepare_data", raises),
        (InstructionOptimization, "inner_loss", raises),
        (InstructionOptimization, "on_train_start", misuses_lightning),
        (torch.optim.Adam, "step", raises),
        (None, "", None),
    ],
)
def test_a_bug_keeps_its_traceback(where, name, bug, tmp_path, monkeypatch):
    arguments = [*small_run(tmp_path), "--test_after_fit=false"]
    if where is not None:
        monkeypatch.setattr(where, name, bug)
    else:
        arguments.append(callbacks(f"{__name__}.Buggy"))
    with pytest.raises(Exception):  # noqa: B017, PT011
        main(["fit", *arguments])


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("wanted", [1, 0.5])
def test_overfitting_repeats_the_first_batches(wanted, blank_exemplars, tmp_path):
    seen = []

    class Seen(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            seen.append({level: rows.input_ids.tolist() for level, rows in batch.items()})

    module = optimization(EmbedderDP(length=3))
    every = data(blank_exemplars, tmp_path, evaluation_batch_size=4)
    quiet_trainer(max_epochs=2, overfit_batches=wanted, limit_val_batches=0, callbacks=[Seen()]).fit(module, every)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == second
    assert len(first) == (1 if wanted == 1 else 4)
    assert len({json.dumps(batch) for batch in first}) == len(first)


def test_a_baseline_clips_and_accumulates_by_the_options_of_a_bilevel_run(blank_exemplars, tmp_path):
    weights = []
    for options, trainers in (
        ({"inner_gradient_clip": 0.1, "inner_accumulation": 2}, {}),
        ({}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        ({}, {}),
    ):
        torch.manual_seed(0)
        module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), **options)
        quiet_trainer(max_steps=2, limit_val_batches=0, **trainers).fit(module, data(blank_exemplars, tmp_path))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_best_checkpoint_of_a_run_that_is_over_is_found(tmp_path, capfd):
    saved = callbacks(f"{CALLBACKS}.ModelCheckpoint", monitor="dev/loss", save_top_k=1, filename="{epoch}")
    last = {"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": {"filename": "newest"}}
    arguments = [*small_run(tmp_path, "demo_random_exemplars.yaml"), "--test_after_fit=false"]
    both = f"--trainer.callbacks={json.dumps([*json.loads(saved.partition('=')[2]), last])}"
    assert main(["fit", *arguments, both]) == 0
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    config = ["--config", str(folder / "config.yaml"), "--ckpt_path=best"]
    assert main(["test", *config]) == 0
    (best,) = (folder / "checkpoints").glob("epoch=*.ckpt")
    assert f"The best by dev/loss is {best}" in capfd.readouterr().err
    best.unlink()
    assert main(["test", *config]) == 2
    assert str(best) in one_sentence(capfd.readouterr().err)
