"""A module as a function that can be differentiated twice and keeps none of its activations."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from diopt_lightning.bilevel.autocast import Autocast
from diopt_lightning.bilevel.products.double_backward import check_twice_differentiable, graph_of
from diopt_lightning.bilevel.products.second_order import second_order
from diopt_lightning.errors import ConfigurationError

# What may stand beside tensors in arguments and results. Another object, such as a cache of keys and values, may hold
# tensors that have a graph, or be changed by a call, so that a second call would compute something else.
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, slice, torch.dtype, torch.device)


class Body(nn.Module):
    """The forward pass that a module has now, without its hooks, as a module of its own.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.name = type(module).__name__
        self._forward = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._forward(*args, **kwargs)

    def check_constants(self, leaves: Sequence[Any]) -> None:
        """Raise where one of the leaves of arguments or results is neither a tensor nor a constant.

        Raises:
            ConfigurationError: If one is.
        """
        for x in leaves:
            if not isinstance(x, (Tensor, Slot, *CONSTANTS)):
                raise ConfigurationError(
                    f"{self.name} is checkpointed, and takes or returns an object of type {type(x).__name__}, which "
                    "may be another one when it is computed again: it must work on tensors and constants. (Models of "
                    "transformers cache keys and values in such objects; call them with `use_cache=False`.)"
                )

    def check_closed(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Raise where outputs depend on a tensor that requires a gradient and is none of ``leaves``.

        Raises:
            ConfigurationError: If they do.
        """
        known = {id(leaf) for leaf in leaves}
        for node in graph_of(outputs):
            other = getattr(node, "variable", None)  # only the node of a leaf has one
            if other is not None and id(other) not in known:
                raise ConfigurationError(
                    f"{self.name} is checkpointed, and uses a tensor of shape {tuple(other.shape)} that requires "
                    "a gradient and is neither argument nor parameter of it: make it one, or do not checkpoint "
                    "activations."
                )


def recomputed(body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what ``body`` returns, with a graph that keeps inputs alone, as does the graph of its gradient."""
    parameters = {name: x for name, x in body.named_parameters() if x.requires_grad}
    tensors: list[Tensor] = list(parameters.values())
    call = Call(body, list(parameters), Frame.of((args, kwargs), tensors), Surroundings(tensors))
    new = Checkpointed.apply(call, *tensors)  # type: ignore[no-untyped-call]
    # A tensor that only passes through is the one that came in, so that no gradient makes the detour.
    return call.returned.filled([*tensors, *new])


class Slot(NamedTuple):
    """The place of a tensor in a list."""

    number: int


class Frame(NamedTuple):
    """Nested containers without the tensors in them."""

    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, nested: Any, tensors: list[Tensor]) -> "Frame":
        """Take the tensors out; those that ``tensors`` does not have yet are appended to it."""
        leaves, structure = tree_flatten(nested)
        for position, x in enumerate(leaves):
            if isinstance(x, Tensor):
                index = next((i for i, known in enumerate(tensors) if known is x), len(tensors))
                tensors[index:] = tensors[index:] or [x]
                leaves[position] = Slot(index)
        return cls(leaves, structure)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Put tensors in."""
        leaves = [tensors[x.number] if isinstance(x, Slot) else x for x in self.leaves]
        return tree_unflatten(leaves, self.structure)


class Surroundings:
    """The random state and the precision at one moment.

    Args:
        tensors: Tensors on the devices that it is about.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._devices = sorted({x.device.index for x in tensors if x.is_cuda})
        self._states = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._state = torch.get_rng_state()
        self.precision = Autocast(tensors)

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Draw the same random numbers as then, and consume none."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._state)
            for device, state in zip(self._devices, self._states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class Call:
    """One call of a module: all that is needed to repeat it, but its tensors.

    Args:
        body: The module.
        names: The names of its parameters among the tensors, of which they are the first.
        arguments: The arguments.
        surroundings: Those of the first run.

    Attributes:
        returned: What the first run returned.
        inspected: Whether it is known that all of it can be differentiated twice.
    """

    returned: Frame

    def __init__(self, body: Body, names: list[str], arguments: Frame, surroundings: Surroundings) -> None:
        self._body, self._names, self._arguments, self._surroundings = body, names, arguments, surroundings
        self.inspected = False

    def run(self, tensors: Sequence[Tensor], first: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Run the module with a graph of its own; return the leaves, one for each tensor, and the new tensors."""
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        args, kwargs = self._arguments.filled(leaves)
        parameters = dict(zip(self._names, leaves, strict=False))
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(second_order())
            stack.enter_context(self._surroundings.precision.again())
            if not first:
                stack.enter_context(self._surroundings.randomness())
            result = torch.func.functional_call(self._body, parameters, args, kwargs)
        known = list(leaves)
        returned = Frame.of(result, known)
        new = known[len(leaves) :]
        if first:
            self._body.check_constants(returned.leaves)
            self._body.check_closed(new, leaves)
            self.returned = returned
        return leaves, new


class Checkpointed(Function):
    """The function of a module; keeps its arguments."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the module."""
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        _, new = call.run(tensors, first=True)
        outputs = [x.detach() for x in new]
        ctx.mark_non_differentiable(*(y for y, x in zip(outputs, new, strict=True) if not x.requires_grad))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pull cotangents back, by a function that can be differentiated itself."""
        tensors = ctx.saved_tensors
        gradient = CheckpointedGradient.apply(ctx.call, len(tensors), *tensors, *cotangents)  # type: ignore[no-untyped-call]
        return None, *gradient


class CheckpointedGradient(Function):
    """The pull-back of cotangents through a module; keeps the module's arguments and the cotangents."""

    @staticmethod
    def forward(ctx: Any, call: Call, count: int, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Run the module again and pull back; its graph ends here."""
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        leaves, outputs = call.run(arguments[:count])
        return tuple(pulled_back(outputs, leaves, arguments[count:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the module again, pull back with a graph, and differentiate that."""
        arguments = ctx.saved_tensors
        leaves, outputs = ctx.call.run(arguments[: ctx.count])
        cotangents = [None if x is None else x.detach().requires_grad_() for x in arguments[ctx.count :]]
        with second_order():
            gradient = pulled_back(outputs, leaves, cotangents, create_graph=True)
            if not ctx.call.inspected:
                check_twice_differentiable(gradient)
                ctx.call.inspected = True
            return None, None, *pulled_back(gradient, [*leaves, *cotangents], directions)


def pulled_back(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    directions: Sequence[Tensor | None],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Pull ``directions`` at ``outputs`` back to ``inputs``; ``None`` where nothing leads there."""
    pairs = [(y, w) for y, w in zip(outputs, directions, strict=True) if y is not None and w is not None]
    pairs = [(y, w) for y, w in pairs if y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    reached, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(reached, wanted, weights, create_graph=create_graph, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
