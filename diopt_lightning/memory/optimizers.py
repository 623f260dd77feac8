"""How much memory an optimizer takes, without giving it the model."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diopt_lightning.memory.live import LiveMemory, tensors_in

Kind = tuple[tuple[int, ...], torch.dtype, torch.device]
"""Shape, precision and place of a parameter."""


class OptimizerMemory(NamedTuple):
    """Bytes that an optimizer takes.

    Args:
        states: Between steps.
        temporary: During a step on top of that.
    """

    states: int
    temporary: int


def optimizer_memory(make: Callable[[Any], Optimizer], parameters: Iterable[Tensor]) -> OptimizerMemory:
    """Measure an optimizer's memory on a stand-in for each different shape of the parameters, one after the other.

    Nothing is assumed about the optimizer: it takes two steps, with gradients of zero, on parameters of zero. States
    depend on shapes in some (Adafactor's), so a stand-in has the shape of what it stands for.

    Args:
        make: Makes the optimizer of a list of parameters.
        parameters: What it will optimize.
    """
    kinds = Counter(map(kind_of, parameters))
    found = {kind: steps(make, [kind]) for kind in kinds}
    states = sum(found[kind].states * number for kind, number in kinds.items())
    sizes = sorted(((found[kind].temporary, kind) for kind in kinds if found[kind].temporary), key=lambda pair: pair[0])
    if not sizes:
        return OptimizerMemory(states, 0)
    # Some step through the parameters, others (most on a GPU) take all of them at once: two of a kind tell.
    least, kind = sizes[0]
    at_once = steps(make, [kind, kind]).temporary > 1.5 * least
    together = sum(size * kinds[kind] for size, kind in sizes)
    return OptimizerMemory(states, together if at_once else sizes[-1][0])


def with_states(make: Callable[[Any], Optimizer], parameters: Sequence[Tensor]) -> Optimizer:
    """An optimizer that looks as if it had taken steps, with states that take no memory before they are copied.

    It has the parameters themselves and must not take a step.

    Args:
        make: Makes the optimizer of a list of parameters.
        parameters: Its parameters.
    """
    optimizer, known = make(list(parameters)), dict[Kind, dict[str, Any]]()
    for parameter in parameters:
        kind = kind_of(parameter)
        if kind not in known:
            state: dict[str, Any] = next(iter(after_a_step(make, [kind]).state.values()), {})
            known[kind] = {name: hollow(value) for name, value in state.items()}
        optimizer.state[parameter] = dict(known[kind])
    return optimizer


def hollow(value: Any) -> Any:
    """Zeros in the shape of a tensor, of which one number is stored; a number, or anything else, as it is."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)


def steps(make: Callable[[Any], Optimizer], kinds: Sequence[Kind]) -> OptimizerMemory:
    """The memory of an optimizer of such parameters, measured in its second step."""
    optimizer = after_a_step(make, kinds)
    with LiveMemory() as live:
        optimizer.step()
    states = {tensor.untyped_storage() for tensor in tensors_in(list(optimizer.state.values()))}
    return OptimizerMemory(sum(storage.nbytes() for storage in states), live.peak)


def after_a_step(make: Callable[[Any], Optimizer], kinds: Sequence[Kind]) -> Optimizer:
    """An optimizer of stand-ins for such parameters that has taken a step."""
    standins = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype, device in kinds]
    for parameter in standins:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make(standins)
    optimizer.step()
    return optimizer


def kind_of(parameter: Tensor) -> Kind:
    """What an optimizer's memory for a parameter depends on."""
    return tuple(parameter.shape), parameter.dtype, parameter.device
