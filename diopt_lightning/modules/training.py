"""Small parts of a training step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diopt_lightning.bilevel import ProcessAverage
from diopt_lightning.bilevel.distributed import several_processes
from diopt_lightning.bilevel.sharding import any_sharded, shards
from diopt_lightning.bilevel.vectors import norm


@contextmanager
def constants(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Treat parameters as constants meanwhile: no graph for them, and no gradient in their ``.grad``."""
    required = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and restore the mode of every submodule afterwards."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients, a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return norm(gradients) if any_sharded(gradients) else nn.utils.get_total_norm(gradients)


def clip(parameters: Sequence[nn.Parameter], size: Tensor, limit: float | None) -> None:
    """Scale gradients to a norm of at most ``limit``.

    Args:
        parameters: Their gradients are scaled in place.
        size: The norm of the gradients, a finite scalar; see :func:`gradient_norm`.
        limit: ``None`` for no limit.
    """
    if limit is None:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any_sharded(gradients):
        nn.utils.clip_grads_with_norm_(parameters, limit, size)
        return
    torch._foreach_mul_(shards(gradients), (limit / (size + 1e-6)).clamp(max=1.0))


def share(weight: float, average: ProcessAverage, device: torch.device) -> float:
    """What a batch counts among those of all processes, one on average.

    Processes are averaged, and their losses are means over unequal numbers (of target tokens, say): weighted so, the
    average is the loss of the global batch.

    Args:
        weight: What the loss of this process's batch is a mean over.
        average: The average over processes.
        device: Where the processes meet.
    """
    if not several_processes():
        return 1.0
    # Not of the default precision, in which a run in bfloat16 could not count to a thousand.
    own = torch.tensor([weight], dtype=torch.float64, device=device)
    (mean,) = average([own])
    return (own / mean).item()
