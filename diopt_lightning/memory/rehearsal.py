"""The memory of a run's steps, from rehearsals of them on a few rows."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from diopt_lightning.bilevel import BilevelProblem, HypergradientEstimator, MicroBatches
from diopt_lightning.bilevel.problem import Loss
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.instructions import InstructionEmbeddings
from diopt_lightning.memory.live import LiveMemory, Moment, aligned
from diopt_lightning.memory.optimizers import optimizer_memory, with_states
from diopt_lightning.modules import InstructionOptimization, InstructionTuning
from diopt_lightning.modules.gradients import constants, evaluation_mode

# One row is computed in other ways: nothing is summed over rows, and copies are views.
FEW, MORE = 2, 3
SPLITS = {"inner": "train", "outer": "validation"}

Parts = dict[str, int]
"""Bytes of each part of a step's peak memory."""


def rows_at_once(batch_size: int, micro_batches: int) -> int:
    """Rows whose activations are in memory together, of a batch that is computed in micro-batches.

    Example:
        >>> rows_at_once(16, 3)
        6
    """
    return math.ceil(batch_size / micro_batches)


@dataclass
class Rehearsal:
    """Measures what the steps of a run hold at their peak, and leaves everything as it was.

    A step is done on two rows and on three, as long as they get, with its memory followed at each operation. The
    difference is what a row adds there (activations), the rest does not grow with the batch (gradients and the solver's
    vectors). So the peak of a step on any number of rows is the largest sum over its operations. Where the run has no
    more than two rows at once, the rehearsal is the step itself: it never takes more than the run.

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
            makers, parts = [module.inner_level.make_optimizer, module.outer_level.make_optimizer], module.micro_batches
        else:
            makers, parts = [module.optimizer], 1
        optimized = [[p for g in opt.param_groups for p in g["params"]] for opt in self.trainer.optimizers]
        optimizers = [optimizer_memory(make, p) for make, p in zip(makers, optimized, strict=True)]
        always = {
            "weights": stored([*module.parameters(), *module.buffers()]),
            "optimizer states": sum(optimizer.states for optimizer in optimizers),
        }
        gradients = stored(optimized[0])
        if isinstance(self.trainer.strategy, DDPStrategy):
            always["buckets of ddp"] = gradients  # out of which gradients are averaged over processes
        # The step of the outer optimizer is never the peak: hypergradients need more vectors in phi's shape.
        update = {"gradients and vectors": gradients + optimizers[0].temporary}
        with untouched(module), self._widest():
            backward = self._peak(self._inner_step, {"inner": rows_at_once(self.data.batch_size, parts)})
            found = {"inner step": always | max(backward, update, key=total)}
            if isinstance(module, InstructionOptimization):
                sizes = {"inner": self.data.batch_size, "outer": self.data.outer_batch_size}
                rows = {level: rows_at_once(size, parts) for level, size in sizes.items()}
                found["outer step"] = always | self._peak(self._outer_step, rows)
        return found

    @contextmanager
    def _widest(self) -> Iterator[None]:
        """Let the first row of every batch have as long an instruction as any row of a whole batch is given.

        Instructions may be drawn, and are drawn anew for another number of rows. Batches are to be as wide as they get,
        and equally wide however few rows they have.
        """
        instruction = self.module.instruction
        if instruction is None:
            yield
            return
        batch = on_device(self.data.longest_batch("train", self.data.batch_size), self.module)
        longest = int(instruction(batch, self.module.backbone.embed).mask.sum(dim=1).max())

        def widen(_: Any, __: Any, made: InstructionEmbeddings) -> InstructionEmbeddings:
            mask = made.mask.clone()
            mask[:1] = torch.arange(mask.shape[1], device=mask.device) < longest
            return made._replace(mask=mask)

        handle = instruction.register_forward_hook(widen)
        try:
            yield
        finally:
            handle.remove()

    def _peak(self, step: Callable[[LiveMemory, dict[str, Batch]], None], rows: dict[str, int]) -> Parts:
        """Rehearse a step twice, and say what is in memory at its peak with so many rows at each level."""
        timelines: list[list[Moment]] = []
        for limit in (FEW, MORE):
            batches = {level: self._batch(level, min(limit, number)) for level, number in rows.items()}
            live = LiveMemory()
            live.level = next(reversed(rows))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run itself will warn
                step(live, batches)
            timelines.append(live.moments)
        few, more = timelines
        return peak(few, more, rows)

    def _batch(self, level: str, rows: int) -> Batch:
        """Long rows of a level on the device, of which only the first says how wide the batch becomes."""
        batch = self.data.longest_batch(SPLITS[level], rows)
        batch.attention_mask[1:, 1:] = 0
        return on_device(batch, self.module)

    def _inner_step(self, live: LiveMemory, batches: dict[str, Batch]) -> None:
        module = self.module
        if isinstance(module, InstructionOptimization):
            accumulated, passes = module.inner_level.accumulation, min(module.inner_level.accumulation, 2)
        else:
            accumulated, passes = self.trainer.accumulate_grad_batches, 2
        with live:
            for _ in range(passes):
                loss = self._loss(batches["inner"])
                # Lightning lets go of the last gradients only now; a bilevel module has none any more.
                if accumulated == 1:
                    clear_gradients(module)
                loss.backward()  # type: ignore[no-untyped-call]
        clear_gradients(module)

    def _loss(self, batch: Batch) -> Tensor:
        module = self.module
        with self.trainer.precision_plugin.train_step_context():
            if isinstance(module, InstructionOptimization):
                with constants(module.outer_parameters()):
                    return module.inner_loss(batch)
            with silent(module):
                return module.training_step({"inner": batch}, 0)["loss"]

    def _outer_step(self, live: LiveMemory, batches: dict[str, Batch]) -> None:
        module = self.module
        assert isinstance(module, InstructionOptimization)
        estimator: HypergradientEstimator = deepcopy(module.hypergradient, {id(module): module})
        # Two micro-batches of so many rows stand for all: one is in memory, beside what the others have left.
        parts = min(module.micro_batches, 2)
        inner, outer = (Batch(*(torch.cat([column] * parts) for column in batches[level])) for level in SPLITS)
        # Estimators may look at the gradient of an inner step.
        self._loss(batches["inner"]).backward()  # type: ignore[no-untyped-call]
        with micro_batches(module, parts), self.trainer.precision_plugin.train_step_context(), live:
            problem = module.problem([inner], outer)
            if not self.trainer.optimizers[0].state:
                later = with_states(module.inner_level.make_optimizer, problem.inner_parameters)
                problem = replace(problem, inner_optimizer=later)
            observe(estimator, problem, live)
            clear_gradients(module)
            number = module.outer_level.accumulation - 1
            earlier = [torch.zeros_like(parameter) for parameter in problem.outer_parameters for _ in range(number)]
            with evaluation_mode(module):
                estimator(marked(problem, live))
            del earlier  # the hypergradients that are averaged with the last one


def peak(few: Sequence[Moment], more: Sequence[Moment], rows: dict[str, int]) -> Parts:
    """The parts of memory at the moment when it is the largest, of a step on ``rows`` instead of few rows."""
    found: list[Parts] = [{}]
    for moment, later in aligned(few, more):
        number = rows[moment.level]
        if number <= FEW:  # this is the step itself, and one number of rows does not tell the parts from each other
            parts = {"gradients, vectors and activations": moment.size}
        else:
            growth = max(later.size - moment.size, 0) // (MORE - FEW)
            parts = {
                "gradients and vectors": max(moment.size - FEW * growth, 0),
                "activations": number * growth,
            }
        if total(parts) > total(found[-1]):
            found.append(parts)
    return found[-1]


def on_device(batch: Batch, module: pl.LightningModule) -> Batch:
    """Move a batch to a module."""
    return Batch(*(column.to(module.device) for column in batch))


def total(parts: Parts) -> int:
    """All of it."""
    return sum(parts.values())


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those in a shared storage counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def observe(estimator: HypergradientEstimator, problem: BilevelProblem, live: LiveMemory) -> None:
    """Show inner steps to an estimator until it remembers as much as it ever will."""
    before = -1
    while live.size > before:
        before = live.size
        estimator.observe(problem)


def marked(problem: BilevelProblem, live: LiveMemory) -> BilevelProblem:
    """Let the losses of a problem say which level is being computed."""

    def marking(level: str, loss: Loss) -> Tensor:
        live.level = level
        return loss()

    def marked_loss(level: str, loss: Loss | MicroBatches) -> Loss | MicroBatches:
        if isinstance(loss, MicroBatches):
            return replace(loss, losses=[partial(marking, level, part) for part in loss.losses])
        return partial(marking, level, loss)

    return replace(
        problem,
        inner_loss=marked_loss("inner", problem.inner_loss),
        outer_loss=marked_loss("outer", problem.outer_loss),
    )


def clear_gradients(module: pl.LightningModule) -> None:
    """Remove all gradients."""
    for parameter in module.parameters():
        parameter.grad = None


@contextmanager
def untouched(module: pl.LightningModule) -> Iterator[None]:
    """Restore gradients and random state afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    clear_gradients(module)
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def micro_batches(module: InstructionOptimization, number: int) -> Iterator[None]:
    """Compute hypergradients in another number of micro-batches meanwhile."""
    before, module.micro_batches = module.micro_batches, number
    try:
        yield
    finally:
        module.micro_batches = before


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Let a module log nothing meanwhile."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    module.log = nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log
