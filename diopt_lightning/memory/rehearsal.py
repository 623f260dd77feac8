"""The memory of a run's steps, from rehearsals of them on a few rows."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.instructions import InstructionEmbeddings
from diopt_lightning.memory.live import LiveMemory, Moment, growth, stored
from diopt_lightning.memory.optimizers import optimizer_memory
from diopt_lightning.modules import InstructionOptimization, InstructionTuning
from diopt_lightning.modules.gradients import constants, evaluation_mode

# One row is computed in other ways: nothing is summed over rows, and copies are views.
FEW = 2
SPLITS = {"inner": "train", "outer": "validation"}

Step = Callable[[LiveMemory, dict[str, Batch]], None]
"""Takes a step on a batch of each level while its memory is followed."""

Parts = Counter[str]
"""Bytes of each part of a step's peak memory."""


@dataclass
class Rehearsal:
    """Measures what the steps of a run hold at their peak, and leaves everything as it was.

    A step is done on two rows, as long as they get, and again with a third row at each level, with its memory followed
    at each operation. The difference is what a row adds there (activations), the rest does not grow with the batch
    (gradients and the solver's vectors). So the peak of a step on any number of rows is the largest sum over its
    operations. Where the run has no more than two rows at once, the rehearsal is the step itself: it never takes more
    than the run.

    Args:
        trainer: The trainer, about to start.
        module: Its module.
        data: Its data.
    """

    trainer: pl.Trainer
    module: InstructionOptimization | InstructionTuning
    data: NaturalInstructionsDataModule

    def steps(self) -> dict[str, Parts]:
        """The parts of the peak of an inner step and, of a bilevel run, of an outer step."""
        module = self.module
        if isinstance(module, InstructionOptimization):
            makers = [module.inner_level.make_optimizer, module.outer_level.make_optimizer]
        else:
            makers = [module.optimizer]
        optimized = [[p for g in opt.param_groups for p in g["params"]] for opt in self.trainer.optimizers]
        optimizers = [optimizer_memory(make, parameters) for make, parameters in zip(makers, optimized, strict=True)]
        always = {
            "weights": stored([*module.parameters(), *module.buffers()]),
            "optimizer states": sum(optimizer.states for optimizer in optimizers),
        }
        gradients = stored(optimized[0])
        if isinstance(self.trainer.strategy, DDPStrategy):
            always["buckets of ddp"] = gradients  # out of which gradients are averaged over processes
        # The step of the outer optimizer is never the peak: hypergradients need more vectors in phi's shape.
        update = Parts({"gradients and vectors": gradients + optimizers[0].temporary})
        with no_trace(module), self._equally_wide():
            backward = self._peak(self._inner_step, {"inner": self.data.batch_size})
            found = {"inner step": Parts(always | max(backward, update, key=Parts.total))}
            if len(optimizers) == 2:
                step = partial(self._outer_step, optimizers[0].stepped)
                sizes = {"inner": self.data.batch_size, "outer": self.data.outer_batch_size}
                found["outer step"] = Parts(always | self._peak(step, sizes))
        return found

    def _equally_wide(self) -> AbstractContextManager[Any]:
        """Let the first row of every batch have as long an instruction as any row of a whole batch is given.

        Instructions may be drawn, and are drawn anew for another number of rows. Batches are to be as wide as they get,
        and equally wide however few rows they have.
        """
        module = self.module
        if module.instruction is None:
            return nullcontext()
        batch = self.trainer.strategy.batch_to_device(self.data.longest_batch("train", self.data.batch_size))
        longest = int(module.instruction(batch, module.backbone.embed).mask.sum(dim=1).max())

        def widen(_: Any, __: Any, made: InstructionEmbeddings) -> InstructionEmbeddings:
            mask = made.mask.clone()
            mask[:1] = torch.arange(mask.shape[1], device=mask.device) < longest
            return made._replace(mask=mask)

        return module.instruction.register_forward_hook(widen)

    def _peak(self, step: Step, batch_sizes: dict[str, int]) -> Parts:
        """Rehearse a step, and say what is in memory at its peak with such batches at each level."""
        micro_batches = self.module.micro_batches if isinstance(self.module, InstructionOptimization) else 1
        rows = {level: math.ceil(size / micro_batches) for level, size in batch_sizes.items()}  # in memory at once
        least = {level: min(number, FEW) for level, number in rows.items()}
        first = self._moments(step, least)
        levels = [level for level, number in rows.items() if number > FEW]
        growths = {level: growth(first, self._moments(step, least | {level: FEW + 1})) for level in levels}
        peak = Parts()
        for index, (_, size) in enumerate(first):
            of_a_row = {level: max(grown[index], 0) for level, grown in growths.items()}
            rest = max(size - FEW * sum(of_a_row.values()), 0)
            activations = sum(rows[level] * size for level, size in of_a_row.items())
            peak = max(peak, Parts({"gradients and vectors": rest, "activations": activations}), key=Parts.total)
        # One number of rows does not tell the parts from each other.
        return peak if len(levels) == len(rows) else Parts({"gradients, vectors and activations": peak.total()})

    def _moments(self, step: Step, rows: dict[str, int]) -> list[Moment]:
        """Follow the memory of a step on a long row, which says how wide a batch becomes, and the shortest beside it.

        Causal models compute logits from the end of the shortest source on, for all rows.
        """
        batches = {level: self.data.longest_batch(SPLITS[level], number) for level, number in rows.items()}
        for batch in batches.values():
            batch.attention_mask[1:, 1:] = 0
        live = LiveMemory()
        step(live, self.trainer.strategy.batch_to_device(batches))
        return live.moments

    def _inner_step(self, live: LiveMemory, batches: dict[str, Batch]) -> None:
        module = self.module
        if isinstance(module, InstructionOptimization):
            accumulated = module.inner_level.accumulation * module.micro_batches
            passes = min(accumulated, 2)
        else:
            accumulated, passes = self.trainer.accumulate_grad_batches, 2
        with live:
            for _ in range(passes):
                loss = self._inner_loss(batches["inner"])
                # Lightning lets go of the last gradients only now; a bilevel module has none any more.
                if accumulated == 1:
                    module.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
        module.zero_grad()

    def _inner_loss(self, batch: Batch) -> Tensor:
        module = self.module
        with self.trainer.precision_plugin.train_step_context():
            if isinstance(module, InstructionOptimization):
                with constants(module.outer_parameters()):
                    return module.inner_loss(batch)
            return module.inner_loss(batch)

    def _outer_step(self, inner_optimizer: Optimizer, live: LiveMemory, batches: dict[str, Batch]) -> None:
        module = self.module
        assert isinstance(module, InstructionOptimization)
        estimator = deepcopy(module.hypergradient, {id(module): module})
        parts = module.micro_batches
        inner, outer = (Batch(*(torch.cat([column] * parts) for column in batches[level])) for level in SPLITS)
        outers = outer if module.outer_batches == 1 else [outer] * module.outer_batches
        problem = replace(module.problem([inner], outers), inner_optimizer=inner_optimizer)
        self._inner_loss(batches["inner"]).backward()  # type: ignore[no-untyped-call]
        with self.trainer.precision_plugin.train_step_context(), live:
            # Some estimators look at gradients of inner steps; none learns more from further ones.
            for _ in range(max(estimator.recorded_steps, 1)):
                estimator.observe(problem)
            module.zero_grad()
            number = module.outer_level.accumulation - 1
            earlier = [torch.zeros_like(parameter) for parameter in problem.outer_parameters for _ in range(number)]
            with evaluation_mode(module):
                estimator(problem)
            del earlier  # the hypergradients that are averaged with the last one


@contextmanager
def no_trace(module: pl.LightningModule) -> Iterator[None]:
    """Start without gradients, restore them and the random state afterwards, and show no warnings meanwhile."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    module.zero_grad()
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
