"""Gradients of parameters, and the modes of modules, around a step of training."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diopt_lightning.bilevel.sharding import any_sharded, shards
from diopt_lightning.bilevel.vectors import norm
from diopt_lightning.errors import ConfigurationError


@contextmanager
def constants(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Treat parameters as constants meanwhile: no graph for them, and no gradient in their ``.grad``."""
    parameters = list(parameters)
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


def check_clip(level: str, largest: float | None) -> None:
    """Check the largest norm of the gradient of a level.

    Raises:
        ConfigurationError: If it is not positive.
    """
    if largest is not None and not largest > 0:
        raise ConfigurationError(f"`{level}_gradient_clip` must be positive or null, got {largest}.")


def clip(parameters: Sequence[nn.Parameter], size: Tensor, limit: float | None) -> None:
    """Scale gradients of this norm, a finite scalar, in place to one of at most ``limit``; ``None`` for no limit."""
    if limit is None:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any_sharded(gradients):
        nn.utils.clip_grads_with_norm_(parameters, limit, size)
        return
    torch._foreach_mul_(shards(gradients), (limit / (size + 1e-6)).clamp(max=1.0))
