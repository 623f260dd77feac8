"""Losses of batches that are computed in parts, and weighed among those of other processes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diopt_lightning.bilevel import MicroBatches, ProcessAverage
from diopt_lightning.bilevel.distributed import several_processes
from diopt_lightning.bilevel.problem import Loss, differentiable, scalar
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.modules.noticing import Noticing


class MicroBatched(Noticing):
    r"""A module whose losses are means, over batches that may be computed in parts and differ between processes.

    The loss of the global batch is :math:`\sum_i w_i L_i / \sum_i w_i` over the parts of the batches of all processes,
    where a loss :math:`L_i` is a mean over :math:`w_i` rows (or target tokens; see :meth:`batch_weight`). A subclass
    sets the attributes.

    Attributes:
        micro_batches: Parts in which every batch is computed, one at a time.
    """

    micro_batches: int
    _average: ProcessAverage

    def split_batch(self, batch: Any, parts: int) -> list[Any]:
        """Split a batch into at most so many parts, each a batch; override it for batches of another make.

        Default: all tensors in the batch are split along their first dimension.

        Raises:
            ConfigurationError: If there is no tensor to split, or they differ in length.
        """
        leaves, structure = tree_flatten(batch)
        lengths = {len(leaf) if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigurationError(
                f"`micro_batches` is {parts}, and a batch can be split only if its tensors are of one length, got "
                f"{sorted(lengths)}: override `split_batch`, or set `micro_batches` to 1."
            )
        columns = [leaf.chunk(parts) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        count = next(len(column) for column in columns if isinstance(column, tuple))
        return [
            tree_unflatten([column[index] if isinstance(column, tuple) else column for column in columns], structure)
            for index in range(count)
        ]

    def batch_weight(self, batch: Any) -> float:
        """What a loss is the mean over, by which parts and processes are weighed. Default: rows; else override it."""
        rows = (len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim() > 0)
        return float(next(rows, 1))

    def weighted_parts(self, batch: Any) -> list[tuple[Any, float]]:
        """The micro-batches of a batch, and which share of its loss each has; the shares sum to one."""
        if self.micro_batches == 1:
            return [(batch, 1.0)]
        parts = self.split_batch(batch, self.micro_batches)
        sizes = [self.batch_weight(part) for part in parts]
        return [(part, size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)]

    def add_gradient(self, loss: Callable[[Any], Tensor], batch: Any, accumulation: int, exchange: bool) -> Tensor:
        """Add a share, one of ``accumulation``, of the inner loss's gradient to ``.grad``, one micro-batch at a time.

        With the last backward pass processes exchange what has been accumulated, if that is asked for.

        Returns:
            The loss of the global batch, a detached scalar.

        Raises:
            ConfigurationError: If the loss is no scalar, or has no gradient.
        """
        parts = self.weighted_parts(batch)
        factor = process_weight(self.batch_weight(batch), self._average, self.device)
        total = torch.zeros((), device=self.device)
        for number, (part, weight) in enumerate(parts, start=1):
            with self._exchange(exchange and number == len(parts)):
                value = factor * weight * differentiable(scalar(loss(part), "inner_loss"), "inner_loss")
                self.manual_backward(value / accumulation)
            total = total + value.detach()
        (mean,) = self._average([total])
        return mean

    def _exchange(self, now: bool) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) and not now else nullcontext()

    def mean_loss(
        self, loss: Callable[[Any], Tensor], batches: Sequence[Any], noticed: bool = False
    ) -> Loss | MicroBatches:
        """The mean of a loss over batches, each computed in micro-batches, for the engine to evaluate.

        Evaluations are ``unnoticed``, or all but the first one.
        """
        parts: list[Loss] = []
        weights: list[float] = []
        for batch in batches:
            factor = process_weight(self.batch_weight(batch), self._average, self.device)
            for part, weight in self.weighted_parts(batch):
                parts.append(Evaluated(self, loss, part, factor, noticed))
                weights.append(weight)
        return parts[0] if len(parts) == 1 else MicroBatches(parts, weights)


@dataclass
class Evaluated:
    """A multiple of a module's loss of a batch, without notice but for the first time, if that is ``noticed``."""

    module: Noticing
    loss: Callable[[Any], Tensor]
    batch: Any
    factor: float
    noticed: bool

    def __call__(self) -> Tensor:
        """Evaluate it."""
        noticed, self.noticed = self.noticed, False
        with nullcontext() if noticed else self.module.unnoticed():
            value = self.loss(self.batch)
        # What is no tensor, the engine refuses by its name.
        return value if self.factor == 1.0 or not isinstance(value, Tensor) else self.factor * value


def process_weight(weight: float, average: ProcessAverage, device: torch.device) -> float:
    """What the loss of this process's batch counts among those of all processes, one on average.

    Processes are averaged, and their losses are means over unequal numbers (of target tokens, say): weighted so, the
    average is the loss of the global batch. All processes must ask together.
    """
    if not several_processes():
        return 1.0
    # Not of the default precision, in which a run in bfloat16 could not count to a thousand.
    own = torch.tensor([weight], dtype=torch.float64, device=device)
    (mean,) = average([own])
    return (own / mean).item()
