"""Small parts of a training step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


def clip(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients to a norm of at most ``limit``, and return the norm before that.

    Raises:
        RuntimeError: If the norm is not finite: a step along it would destroy the parameters.
    """
    largest = limit if limit is not None else float("inf")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any_sharded(gradients):
        return nn.utils.clip_grad_norm_(parameters, max_norm=largest, error_if_nonfinite=True)
    size = norm(gradients)
    if not size.isfinite():
        raise RuntimeError(f"The norm of the gradient is not finite ({size.item()}), so it cannot be clipped.")
    factor = (largest / (size + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shards(gradients), factor)
    return size
