"""Parameters of one optimizer that are treated by options of their own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from diopt_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class ParameterGroup:
    """Some of the parameters of an optimizer, with options of their own.

    In a configuration, ``inner_groups: [{vectors: true, options: {weight_decay: 0.0}}]`` leaves the scales of norms and
    biases without weight decay, and ``outer_groups: [{names: ["*bilinear*"], options: {lr: 0.001}}]`` gives bilinear
    forms a learning rate of their own. With ``learned: false`` a group stays as it is: others are learned alone.

    Args:
        options: What is another for them, by its name in the optimizer. All other options are as for the rest.
        names: Shell patterns, of which one must match a parameter's name as it is in checkpoints, e.g.
            ``instruction.*``. Default: any name.
        vectors: Whether to take only parameters of one dimension, which are norms' scales and biases. Default: no.
        learned: Whether they are learned at all; heeded by modules that build their model themselves. Default: yes.

    Example:
        >>> group = ParameterGroup({"weight_decay": 0.0}, vectors=True)
    """

    options: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=lambda: ["*"])
    vectors: bool = False
    learned: bool = True

    def has(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is one of the group."""
        return any(fnmatchcase(name, each) for each in self.names) and (parameter.dim() < 2 or not self.vectors)


def freeze(groups: Sequence[ParameterGroup], named: Mapping[str, nn.Parameter]) -> None:
    """Take the gradient from parameters of groups that are not learned; names are those of checkpoints."""
    for name, parameter in named.items():
        if not next((group.learned for group in groups if group.has(name, parameter)), True):
            parameter.requires_grad_(False)


def grouped(
    groups: Sequence[ParameterGroup], *rest: tuple[Mapping[str, nn.Parameter], dict[str, Any]], option: str
) -> list[dict[str, Any]]:
    """The groups of an optimizer; a parameter stands in the first that it fits, and comes first where it fits none.

    Args:
        groups: The groups.
        *rest: Parameters by name, and the options of those that are in no group.
        option: What the groups are called in a configuration.

    Raises:
        ConfigurationError: If nothing is left for a group.
    """
    chosen: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
    for i, (named, _) in enumerate(rest):
        for name, parameter in named.items():
            number = next((j for j, group in enumerate(groups) if group.has(name, parameter)), -1)
            chosen[number, i].append(parameter)
    for j, group in enumerate(groups):
        if group.learned and not any(number == j for number, _ in chosen):
            names = [name for named, _ in rest for name in named]
            raise ConfigurationError(
                f"`{option}[{j}]` (names {group.names}, vectors {group.vectors}) has no parameter that is in no group "
                f"before it: the names are like `{names[0]}` and `{names[-1]}`."
            )
    return [
        {**rest[i][1], **(groups[number].options if number >= 0 else {}), "params": parameters}
        for (number, i), parameters in sorted(chosen.items(), key=lambda entry: entry[0])
    ]


def check_options(optimizer: Optimizer, groups: Sequence[ParameterGroup], option: str) -> None:
    """Refuse options that an optimizer does not have, which PyTorch would keep and never look at.

    Raises:
        ConfigurationError: If there is one, or something stands where a number belongs.
    """
    for j, group in enumerate(groups):
        for name, value in group.options.items():
            if name not in optimizer.defaults:
                raise ConfigurationError(
                    f"`{option}[{j}].options` has `{name}`, which {type(optimizer).__name__} does not: it has "
                    f"{', '.join(sorted(optimizer.defaults))}."
                )
            default = optimizer.defaults[name]
            if isinstance(default, float) and not (isinstance(value, float | int) and value >= 0):
                raise ConfigurationError(f"`{option}[{j}].options.{name}` must be a number from 0 on, got {value!r}.")
