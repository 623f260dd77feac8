"""Noise on what is learned at the outer level."""

import random

import lightning.pytorch as pl
import torch

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.modules import BilevelModule
from diopt_lightning.modules.evaluation import InstructionEvaluation


class UniformNoise(pl.Callback):
    r"""Adds noise to the outer parameters before every batch of the inner level.

    .. math:: \phi \leftarrow \phi + u \quad\text{with}\quad u_i \sim U(-\text{size}, \text{size})

    It stays there, as in the reference implementation, so that :math:`\phi` wanders besides learning. The draws depend
    on the seed and the batch's number alone: they are the same on all processes and in a run that goes on.

    Args:
        size: The most that is added to an entry.
        seed: Seed of the draws.

    Raises:
        ConfigurationError: If the size is not positive, or there are no outer parameters.

    Example:
        >>> callback = UniformNoise(size=1e-3)
    """

    def __init__(self, size: float, seed: int = 0) -> None:
        if not size > 0:
            raise ConfigurationError(f"`size` of uniform noise must be positive, got {size}.")
        self.size = size
        self.seed = seed

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Add the noise."""
        generator = torch.Generator().manual_seed(
            random.Random(f"noise/{self.seed}/{trainer.current_epoch}/{batch_idx}").getrandbits(63)
        )
        for parameter in outer_parameters(pl_module):
            drawn = torch.empty(parameter.shape).uniform_(-self.size, self.size, generator=generator)
            parameter.add_(drawn.to(parameter))


def outer_parameters(module: pl.LightningModule) -> list[torch.nn.Parameter]:
    """What a module learns at the outer level, or the parameters of its instruction.

    Raises:
        ConfigurationError: If there are none.
    """
    found: list[torch.nn.Parameter] = []
    if isinstance(module, BilevelModule):
        found = list(module.outer_parameters())
    elif isinstance(module, InstructionEvaluation) and module.instruction is not None:
        found = list(module.instruction.parameters())
    if not found:
        raise ConfigurationError(
            f"The callback UniformNoise adds noise to outer parameters, and {type(module).__name__} has none: remove "
            "the callback."
        )
    return found
