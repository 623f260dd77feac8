"""How much memory an optimizer takes, without giving it the model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from diopt_lightning.memory.live import LiveMemory, stored


class OptimizerMemory(NamedTuple):
    """What an optimizer takes.

    Args:
        states: Bytes between steps.
        temporary: Bytes during a step on top of that.
        stepped: An optimizer of the parameters themselves that has states as if it had taken steps, and must take none.
            The states take no memory before they are copied: one number of each is stored.
    """

    states: int
    temporary: int
    stepped: Optimizer


def optimizer_memory(make: Callable[[Any], Optimizer], parameters: Sequence[Tensor]) -> OptimizerMemory:
    """Measure an optimizer's memory on a stand-in for each of the parameters, one after the other.

    Nothing is assumed about the optimizer: it takes two steps, with gradients of zero, on parameters of zero. States
    depend on shapes in some (Adafactor's), so a stand-in has the shape of what it stands for.

    Args:
        make: Makes the optimizer of a list of parameters.
        parameters: What it will optimize.
    """
    stepped, states, temporary = make(list(parameters)), 0, dict[Tensor, int]()
    for parameter in parameters:
        of_stand_in, temporary[parameter] = second_step(make, [parameter])
        for state in of_stand_in.values():
            states += stored(state)
            stepped.state[parameter] = tree_map_only(Tensor, lambda one: one.new_ones(()).expand(one.shape), state)
    # Some step through the parameters, others (most on a GPU) take all of them at once: two of a shape tell.
    taking = {size: parameter for parameter, size in temporary.items() if size}
    least = min(taking, default=0)
    at_once = least and second_step(make, [taking[least]] * 2)[1] > 1.5 * least
    return OptimizerMemory(states, sum(temporary.values()) if at_once else max(taking, default=0), stepped)


def second_step(make: Callable[[Any], Optimizer], parameters: Sequence[Tensor]) -> tuple[dict[Tensor, Any], int]:
    """Take two steps of an optimizer of stand-ins; return its states and the bytes that the second took beside them."""
    stand_ins = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    for stand_in in stand_ins:
        stand_in.grad = torch.zeros_like(stand_in)
    optimizer = make(stand_ins)
    optimizer.step()
    with LiveMemory() as live:
        optimizer.step()
    return optimizer.state, max((size for _, size in live.moments), default=0)
