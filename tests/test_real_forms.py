"""Every form of instruction on the real tasks: it trains, resumes bitwise, and trains on two processes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from diopt_lightning import InstructionOptimization
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.bilevel import Neumann
from diopt_lightning.callbacks import RandomState
from diopt_lightning.data import NaturalInstructionsDataModule
from tests.conftest import TINY_T5
from tests.forms import LEARNABLE
from tests.helpers import quiet_trainer
from tests.runs import EqualOnAllProcesses, Moved

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning"),
]

# They differ from others in what the demo's tasks show as well, on which every form is trained.
VARIANTS = (
    "embedder_from_definition_encoder",
    "embedder_ic_hidden",
    "embedder_ic_relu",
    "drawn_choices",
    "extractor_ic_soft",
)


@pytest.fixture(autouse=True)
def _one_thread(_compute_small_things_on_one_thread: None) -> None:
    """The model is tiny."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all forms share is tokenized once."""
    return tmp_path_factory.mktemp("token_cache")


class BothMoved(Moved):
    """Fails the run if a level's parameters have not changed at its end."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert all(distance > 0 for distance in self.distances(pl_module).values())


@pytest.mark.parametrize("form", [name for name in LEARNABLE if name not in VARIANTS])
def test_every_form_trains_on_the_real_tasks_and_resumes(form, real_data, t5_tokenizer, token_cache, tmp_path):
    def fit(name: str, steps: int, devices: int = 1, **options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        module = InstructionOptimization(
            RandomSeq2Seq(dict(TINY_T5)),
            LEARNABLE[form](),
            hypergradient=Neumann(terms=1, step_size=1e-3),
            inner_steps=2,
            inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        )
        data = NaturalInstructionsDataModule(
            str(real_data),
            str(t5_tokenizer),
            instances_per_task=2,
            test_instances_per_task=1,
            batch_size=4,
            cache_dir=str(token_cache),
        )
        checkpoint = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(
            max_steps=steps,
            limit_val_batches=0,
            enable_checkpointing=True,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            callbacks=[checkpoint, RandomState(), BothMoved(), *([EqualOnAllProcesses()] if devices > 1 else [])],
        )
        trainer.fit(module, data, **options)
        return module.state_dict()

    fit("two processes", 2, devices=2)
    whole = fit("whole", 4)
    resumed = fit("resumed", 4, ckpt_path=Path(tmp_path / "whole" / "step=2.ckpt"), weights_only=True)
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)
