"""What a module and its optimizers say about the parameters of a level, checked before anything is trained."""

import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from diopt_lightning.errors import OF_A_LIBRARY, ConfigurationError, users_mistake
from diopt_lightning.modules.strategies import refuse_underflow

# Where optimizers and schedulers complain of parameters and options that do not suit them.
WHERE = ("torch.optim", "diopt_lightning.modules.parameters", "diopt_lightning.modules.schedules")


def once(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters of a level as a list, each once: `module.parameters()` can be looked at once alone."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def check_parameters(level: str, given: Any, module: nn.Module) -> list[nn.Parameter]:
    """Return what a module's method gives as the parameters of a level, each once, if they can be optimized.

    Raises:
        ConfigurationError: If there is none, or one is no parameter of the module, is frozen, or has no real values.
    """
    source = f"`{level}_parameters()` of {type(module).__name__}"
    if not callable(given):
        raise ConfigurationError(f"{source} is {type(given).__name__} and no method: define one that returns a list.")
    given = given()
    if isinstance(given, Tensor | Mapping | str) or not isinstance(given, Iterable):
        raise ConfigurationError(f"{source} returned {type(given).__name__}: return a list of parameters.")
    parameters: list[Any] = once(given)
    if not parameters:
        raise ConfigurationError(
            f"{source} is empty, and each level needs a parameter that requires a gradient: return those that are to "
            "be learned (as a list: a generator that is kept is used up at the first look)."
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for position, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise ConfigurationError(
                f"Entry {position} of {source} is {type(parameter).__name__} and no parameter: return `parameters()` "
                "of a module, not `named_parameters()`, or a list of parameters."
            )
        if id(parameter) not in names:
            raise ConfigurationError(
                f"Entry {position} of {source}, of shape {tuple(parameter.shape)}, is no parameter of the module, "
                "which would neither save nor move it: assign it to an attribute, as `torch.nn.Parameter`."
            )
        found = f"`{names[id(parameter)]}` of {source}"
        if is_lazy(parameter):
            raise ConfigurationError(f"{found} has no shape yet: run a batch through its layer in `configure_model`.")
        if parameter.is_inference():
            raise ConfigurationError(f"{found} was made under `inference_mode`: make it outside, to be learned.")
        if not parameter.requires_grad:
            raise ConfigurationError(f"{found} does not require a gradient: unfreeze it, or leave it out.")
        if not parameter.is_floating_point():
            raise ConfigurationError(f"{found} is {parameter.dtype}: solvers compute with real numbers alone.")
    return parameters


def check_levels(inner: Sequence[Tensor], outer: Sequence[Tensor], module: nn.Module) -> None:
    """Refuse a parameter of both levels, and an inner one whose gradient has no second derivatives.

    Raises:
        ConfigurationError: If there is one.
    """
    of_inner = set(map(id, inner))
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and id(part.weight) in of_inner:
            raise ConfigurationError(
                f"`{name}` has sparse gradients, which no solver takes: make it with `sparse=False`."
            )
    of_outer = {id(parameter) for parameter in outer}
    shared = [name for name, parameter in module.named_parameters() if id(parameter) in of_outer & of_inner]
    if shared:
        raise ConfigurationError(
            f"`{shared[0]}` of {type(module).__name__} is both inner and outer (one of {len(shared)}): a parameter "
            "belongs to one level. Leave it out of `inner_parameters()` or of `outer_parameters()`."
        )


@contextmanager
def of_pytorch(what: str, then: str) -> Iterator[None]:
    """Make one sentence of what PyTorch's optimizers and schedulers raise; a bug of somebody's own stays as it is.

    Raises:
        ConfigurationError: In place of those errors; see :func:`~diopt_lightning.errors.users_mistake`.
    """
    try:
        yield
    except OF_A_LIBRARY as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith(WHERE):
            raise
        with users_mistake(type(error), what=what, then=then):
            raise


def made_optimizer(option: str, make: OptimizerCallable, given: Any) -> Optimizer:
    """Make the optimizer of an option for these parameters, or groups of them.

    Raises:
        ConfigurationError: If it cannot be made, is none, or divides by 0.
    """
    then = "choose one that takes all of them, with options of its own."
    with of_pytorch(f"`{option}` cannot be made for the parameters that it is given", then):
        optimizer: Any = make(given)
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"`{option}` made {type(optimizer).__name__}: give a function that takes parameters and returns "
            "an optimizer, such as `lambda parameters: torch.optim.SGD(parameters, lr=0.1)`."
        )
    refuse_underflow(optimizer)
    return optimizer


def check_optimizer(level: str, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Check that an optimizer can take the steps of a level.

    Raises:
        ConfigurationError: If it has other parameters than the level, or evaluates the loss itself.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {id(parameter) for parameter in parameters}
    if held != own:
        raise ConfigurationError(
            f"`{level}_optimizer` made {type(optimizer).__name__} with {len(held & own)} of the {len(own)} parameters "
            f"of `{level}_parameters()` and {len(held - own)} others: let it take all that it is given, and return "
            f"from `{level}_parameters()` those alone that are to be learned."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"`{level}_optimizer` is {type(optimizer).__name__}, which evaluates the loss several times in a step: "
            "choose one that follows a gradient, such as AdamW."
        )


def check_held(level: str, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse parameters that a level has got since its optimizer was made, which would have gradients and no steps.

    Raises:
        ConfigurationError: If there is one.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    new = sum(id(parameter) not in held for parameter in parameters)
    if new:
        raise ConfigurationError(
            f"`{level}_parameters()` has {new} that its optimizer does not: give what is learned later to "
            f"`optimizers()[{int(level == 'outer')}].add_param_group`, or all from the beginning."
        )
