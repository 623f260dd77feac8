"""Training that is of no use, which is said: parameters that stay as they are, and rounds that never end."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from diopt_lightning.bilevel.sharding import shards
from diopt_lightning.modules.schedules import steps_of_a_run

# Steps of a level that are watched, and entries of each parameter that are remembered.
WATCHED, REMEMBERED = 10, 64
# A share of entries that are bitwise what they were after these steps, of half precision, that is warned of.
STILL = 0.9


class IdleParameters:
    """Watches the first steps of a level, and warns of parameters that they leave as they are.

    Those are parameters that no loss reaches, and those whose steps are too short for their precision.

    Args:
        level: ``inner`` or ``outer``.
    """

    def __init__(self, level: str) -> None:
        self.level = level
        self._steps = 0
        self._said = False
        self._names: list[str] = []
        self._before: list[Tensor] = []
        self._reached: list[Tensor] = []
        self._moving: list[Tensor] = []

    def see(self, module: LightningModule, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        """Look at the gradients of a step that is about to be taken, and say what earlier ones have shown."""
        if self._said:
            return
        if self._steps == WATCHED:
            self.say(parameters, optimizer)
            return
        if self._steps == 0:
            names = {id(parameter): name for name, parameter in module.named_parameters()}
            self._names = [names.get(id(parameter), "") for parameter in parameters]
            self._before = [some(parameter).clone() for parameter in parameters]
            self._moving = [torch.zeros_like(entries, dtype=torch.bool) for entries in self._before]
            self._reached = [entries.new_zeros((), dtype=torch.bool) for entries in self._before]
        self._steps += 1
        for parameter, moving, reached in zip(parameters, self._moving, self._reached, strict=False):
            if parameter.grad is not None:
                moving |= some(parameter.grad) != 0
                reached |= shards([parameter.grad])[0].any()
        if self._steps == 1 and not torch.stack(self._reached).any():
            self.say(parameters, optimizer)

    def say(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        """Say which parameters stay as they are, once."""
        if self._said or self._steps == 0:
            return
        self._said = True
        steps = f"{self._steps} {self.level} step{'s' if self._steps > 1 else ''}"
        idle = [name for name, reached in zip(self._names, self._reached, strict=True) if not reached]
        if idle:
            loss = "`inner_loss` does not depend" if self.level == "inner" else "neither loss depends"
            rank_zero_warn(
                f"{len(idle)} of {len(self._names)} {self.level} parameters, such as `{idle[0]}`, had a gradient of "
                f"zero in all of {steps}: {loss} on them. Use them there, or leave them out of "
                f"`{self.level}_parameters()`."
            )
        still = {True: [0, 0], False: [0, 0]}
        for parameter, before, moving in zip(parameters, self._before, self._moving, strict=False):
            counts = still[torch.finfo(parameter.dtype).bits < 32]
            counts[0] += int((moving & (some(parameter) == before)).sum())
            counts[1] += int(moving.sum())
        rates = sorted({group["lr"] for group in optimizer.param_groups if "lr" in group})
        for half, (number, moving_entries) in still.items():
            if number and number >= (STILL if half else 1.0) * moving_entries:
                rank_zero_warn(
                    f"{number / moving_entries:.0%} of the entries of {self.level} parameters that have a gradient"
                    f"{', of half precision,' if half else ''} are what they were after {steps}: a learning rate of "
                    f"{', '.join(map(str, rates))} moves them by less than their precision. Raise it"
                    f"{', or keep them in float32 (`bf16-mixed` does)' if half else ''}."
                )


def some(tensor: Tensor) -> Tensor:
    """Some entries of a tensor, of this process's shard, ``(at most 2 REMEMBERED,)``."""
    flat = shards([tensor.detach()])[0].reshape(-1)
    return flat[:: max(1, flat.numel() // REMEMBERED)]


def say_if_too_short(trainer: Trainer, inner_steps: int, accumulation: int) -> None:
    """Warn of a run that ends before its first outer step."""
    steps = steps_of_a_run(trainer, accumulation)
    if steps < inner_steps:
        rank_zero_warn(
            f"This run takes no outer step: it has {int(steps)} inner steps, and the first outer one comes after "
            f"{inner_steps} (`inner_steps`). Lower `inner_steps`, or train longer (`max_steps`, `max_epochs`)."
        )


def say_that_none_was_taken(skipped: int) -> None:
    """Warn at the end of a run without an outer step."""
    why = f"{skipped} were skipped" if skipped else "no round of `inner_steps` was completed"
    rank_zero_warn(f"No outer step was taken ({why}): the outer parameters are those that the run began with.")
