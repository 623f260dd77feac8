"""Exact products without a graph in between: the reverse derivative of a forward derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from diopt_lightning.bilevel.problem import BilevelProblem, differentiable, scalar
from diopt_lightning.bilevel.products.base import ExactLinearization, Linearization, Product
from diopt_lightning.bilevel.products.second_order import second_order
from diopt_lightning.bilevel.vectors import Vector, as_vector


class ReverseOverForward(Product):
    r"""Exact products by ``torch.func.jvp`` and one backward pass through it.

    .. math:: (H v, J^\top v) = \nabla_{(\theta, \phi)} \left[ \frac{d}{d\epsilon}
              L_{train}(\theta + \epsilon v, \phi) \right]_{\epsilon = 0}

    Nothing is kept between products: each costs about 3 gradients, more than a product of
    :class:`~diopt_lightning.bilevel.DoubleBackward`, and about two thirds of its memory. The right one where a graph of
    the gradient does not fit and products are few, or as an independent check. Attention runs in
    PyTorch's math kernel; activation checkpointing and compiled modules do not work in forward mode.

    Example:
        >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(lambda: (phi * theta**2).sum(), lambda: theta.sum(), [theta], [phi])
        >>> with ReverseOverForward().linearize(problem) as linearization:
        ...     linearization.both([torch.tensor([3.0])])
        ([tensor([6.])], [tensor([6.])])
    """

    def at(self, problem: BilevelProblem) -> Linearization:
        """Return the linearization, which holds nothing; see :class:`Product`."""
        return _Forward(problem, self.fraction)


class _Forward(ExactLinearization):
    def derivatives(self, index: int, v: Vector, parameters: Sequence[Tensor]) -> Vector:
        inner = tuple(self.problem.inner_parameters)
        tangents = tuple(entry.to(parameter.dtype) for entry, parameter in zip(v, inner, strict=True))

        def loss(*duals: Tensor) -> Tensor:
            with Substitution(inner, duals):
                return scalar(self.parts[index][0](), "inner_loss")

        with second_order():
            value, directional = torch.func.jvp(loss, inner, tangents)  # type: ignore[misc]
            self._values[index] = differentiable(value, "inner_loss").detach()
            if not directional.requires_grad:  # the loss is linear, or is not reached
                return as_vector([None] * len(parameters), parameters)
            products = torch.autograd.grad(directional, parameters, allow_unused=True)
        return as_vector(products, parameters)


class Substitution(TorchFunctionMode):
    """Lets operations on some tensors see others in their place.

    A loss is a closure over its model, and ``torch.func`` differentiates functions of their arguments. In here, every
    operation that is given one of ``tensors`` is given its substitute.

    Args:
        tensors: What closures hold.
        substitutes: What operations see instead.
    """

    def __init__(self, tensors: Sequence[Tensor], substitutes: Sequence[Tensor]) -> None:
        super().__init__()
        self._substitutes = {id(tensor): other for tensor, other in zip(tensors, substitutes, strict=True)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with substituted arguments."""
        substitute = self._substitutes
        args, kwargs = tree_map_only(Tensor, lambda x: substitute.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)
