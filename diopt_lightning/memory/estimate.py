"""What a run will need of memory, before it runs out of it."""

from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console
from rich.table import Table

from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.memory.rehearsal import Parts, Rehearsal
from diopt_lightning.modules import InstructionOptimization, InstructionTuning


class MemoryEstimate(Callback):
    """Estimates the peak memory of a run's steps before training, by part, and prints it.

    The parts are weights, optimizer states, gradients with the vectors of the hypergradient's solver, and activations.
    They show what helps: `micro_batches` or a smaller `batch_size` against activations, another estimator against
    vectors, another optimizer against states. The numbers are those of each process, for the longest rows of the data.

    For that an inner and an outer step are rehearsed on two rows and on three, without a trace: the run is bitwise that
    without this callback. What a GPU holds beside tensors (its context, the allocator's cache) and generation for dev
    and test tasks come on top.

    On a GPU it also says when training ends what its steps have taken in fact. The CPU has no such counter.

    In a configuration: ``trainer.callbacks: [diopt_lightning.callbacks.MemoryEstimate]``.

    Attributes:
        estimate: Bytes by step (``inner step``, ``outer step``) and part, once training has started; empty where not
            even the rehearsal fitted into memory.

    Example:
        >>> callback = MemoryEstimate()
        >>> callback.estimate
        {}
    """

    def __init__(self) -> None:
        self.estimate: dict[str, Parts] = {}
        self._measured = 0

    @property
    def peak(self) -> int:
        """Bytes of the larger step."""
        return max((parts.total() for parts in self.estimate.values()), default=0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse the steps and print what they will need.

        Raises:
            ConfigurationError: If the module, its data or the strategy is of another kind.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, InstructionOptimization | InstructionTuning) or not isinstance(
            data, NaturalInstructionsDataModule
        ):
            raise ConfigurationError(
                "The callback MemoryEstimate needs an InstructionOptimization or an InstructionTuning with a "
                f"NaturalInstructionsDataModule, got {type(pl_module).__name__} with {type(data).__name__}: remove the "
                "callback."
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigurationError(
                "The callback MemoryEstimate needs the whole model on each device, got the strategy "
                f"{type(trainer.strategy).__name__}: remove the callback, or use one device or `ddp`."
            )
        self.estimate = {}
        with suppress(torch.OutOfMemoryError):
            self.estimate = Rehearsal(trainer, pl_module, data).steps()
        if trainer.is_global_zero:
            self._print()
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()  # the run needs blocks of other sizes

    def _print(self) -> None:
        console = Console()
        if not self.estimate:
            console.print("Memory: not even steps on two or three rows fit: use a smaller model, or shorter texts.")
            return
        step = max(self.estimate, key=lambda name: self.estimate[name].total())
        # Not the table's title, which would be broken to its width.
        console.print(f"Estimated peak memory: {readable(self.peak)}, in an {step}", highlight=False)
        table = Table("part")
        for name in self.estimate:
            table.add_column(name, justify="right")
        for part in dict.fromkeys(part for parts in self.estimate.values() for part in parts):
            table.add_row(part, *(readable(parts[part]) for parts in self.estimate.values()))
        table.add_row("total", *(readable(parts.total()) for parts in self.estimate.values()))
        console.print(table)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Let a GPU forget what the rehearsal or an evaluation has taken."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Keep the most that a GPU has counted in a step."""
        if pl_module.device.type == "cuda":
            self._measured = max(self._measured, torch.cuda.max_memory_allocated(pl_module.device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the steps have taken, where something has counted it."""
        if self._measured and trainer.is_global_zero:
            Console().print(
                f"Peak memory of the steps: {readable(self._measured)}; the estimate was {readable(self.peak)}."
            )


def readable(size: int) -> str:
    """Bytes in the unit that suits them.

    Example:
        >>> readable(3 * 2**29), readable(3 * 2**19)
        ('1.50 GiB', '1.5 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
