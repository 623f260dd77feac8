"""Short runs on the blank-exemplar experiment, of any instruction and any backbone."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from diopt_lightning import InstructionOptimization
from diopt_lightning.backbones import Backbone, RandomSeq2Seq
from diopt_lightning.bilevel import Neumann
from diopt_lightning.data import BlankExemplars, BlankExemplarsDataModule
from diopt_lightning.instructions import Instruction
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer


def data(experiment: BlankExemplars, root: Path, **options: Any) -> BlankExemplarsDataModule:
    return BlankExemplarsDataModule(str(root), experiment, **({"batch_size": 4, "outer_batch_size": 4} | options))


def optimization(instruction: Instruction, backbone: Backbone | None = None) -> InstructionOptimization:
    return InstructionOptimization(
        backbone if backbone is not None else RandomSeq2Seq(dict(TINY_T5)),
        instruction,
        hypergradient=Neumann(terms=1, step_size=1e-3),
        inner_steps=2,
        inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        outer_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        max_new_tokens=3,
    )


class Moved(pl.Callback):
    """Remembers where a run began, and says how far each part of the module has moved since."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

    def distances(self, module: pl.LightningModule) -> dict[str, float]:
        moved = {name: (value - self.before[name]).norm().item() for name, value in module.named_parameters()}
        return {part: sum(d for n, d in moved.items() if n.startswith(part)) for part in ("backbone", "instruction")}


def moved(module: pl.LightningModule, experiment: BlankExemplars, root: Path, steps: int = 4) -> dict[str, float]:
    """Train a little; return how far each part of the module has moved."""
    callback = Moved()
    quiet_trainer(max_steps=steps, limit_val_batches=0, callbacks=[callback]).fit(module, data(experiment, root))
    return callback.distances(module)


class EqualOnAllProcesses(pl.Callback):
    """Fails the run if what was learned is not bitwise equal on all processes at its end."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            gathered = pl_module.all_gather(parameter.detach())
            assert torch.equal(gathered[0], gathered[1]), name
