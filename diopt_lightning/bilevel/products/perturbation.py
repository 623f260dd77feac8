"""Other values in parameters, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diopt_lightning.bilevel.sharding import shards
from diopt_lightning.bilevel.vectors import Vector


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Return parameters to the same bits at the end, whatever happens to their values meanwhile."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        assign(parameters, before)


@torch.no_grad()
def move(parameters: Sequence[Tensor], v: Vector, step: float) -> None:
    """Add ``step * v`` to parameters in place."""
    way = [x.to(p.dtype) for x, p in zip(shards(v), parameters, strict=True)]
    torch._foreach_add_(shards(parameters), way, alpha=step)


@torch.no_grad()
def assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into parameters in place."""
    torch._foreach_copy_(shards(parameters), shards(values))
