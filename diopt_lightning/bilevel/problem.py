"""The bilevel problem: two losses, two groups of parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from diopt_lightning.bilevel.vectors import Average, identity


@dataclass(frozen=True)
class BilevelProblem:
    r"""One instance of the bilevel problem, at the current values of its parameters.

    .. math:: \min_\phi L_{val}(\theta^*(\phi), \phi) \quad \text{with} \quad
              \theta^*(\phi) = \arg\min_\theta L_{train}(\theta, \phi)

    Args:
        inner_loss: Computes the scalar :math:`L_{train}(\theta, \phi)`. Called once for each hypergradient, so the
            mini-batch (and the dropout mask, if there is one) is the same in all products.
        outer_loss: Computes the scalar :math:`L_{val}(\theta, \phi)`.
        inner_parameters: :math:`\theta`. A tensor that is listed twice (tied weights) counts once.
        outer_parameters: :math:`\phi`.
        average: Averages a vector over processes, so that all of them solve the system of the global batch. The
            default is the identity, which is right on one process;
            :func:`~diopt_lightning.bilevel.distributed.average_over_processes` is right on several.

    Raises:
        ValueError: If a group is empty, a parameter does not require a gradient, or one stands in both groups.

    Example:
        >>> import torch
        >>> theta, phi = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     inner_loss=lambda: (theta - phi).square().sum(),
        ...     outer_loss=lambda: (theta - 3).square().sum(),
        ...     inner_parameters=[theta],
        ...     outer_parameters=[phi],
        ... )
        >>> len(problem.inner_parameters)
        1
    """

    inner_loss: Callable[[], Tensor]
    outer_loss: Callable[[], Tensor]
    inner_parameters: Sequence[Tensor]
    outer_parameters: Sequence[Tensor]
    average: Average = field(default=identity)

    def __post_init__(self) -> None:
        for name in ("inner_parameters", "outer_parameters"):
            parameters = list({id(tensor): tensor for tensor in getattr(self, name)}.values())
            if not parameters:
                raise ValueError(f"`{name}` is empty: a bilevel problem needs at least one parameter at each level.")
            for position, tensor in enumerate(parameters):
                if not tensor.requires_grad:
                    raise ValueError(
                        f"`{name}[{position}]` of shape {tuple(tensor.shape)} does not require a gradient: "
                        "call `.requires_grad_()` on it or leave it out."
                    )
            object.__setattr__(self, name, parameters)
        outer = {id(tensor) for tensor in self.outer_parameters}
        shared = [tuple(tensor.shape) for tensor in self.inner_parameters if id(tensor) in outer]
        if shared:
            raise ValueError(
                f"{len(shared)} parameter(s) of shape {shared} are both inner and outer: a parameter belongs to one "
                "level. Remove them from `inner_parameters` or from `outer_parameters`."
            )
