"""Exact products by differentiating the gradient again."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products.base import ExactLinearization, Linearization, OnceDifferentiableError, Product
from diopt_lightning.bilevel.products.second_order import second_order
from diopt_lightning.bilevel.vectors import Vector, as_vector
from diopt_lightning.errors import ConfigurationError


class DoubleBackward(Product):
    r"""Exact products by differentiating the gradient again.

    .. math:: (H v, J^\top v) = \nabla_{(\theta, \phi)} \langle \nabla_\theta L_{train}, v \rangle

    One graph of the gradient is built, serves all products and is freed when the context closes. It costs about 1
    gradient to build and 2 for each product, and about three times the memory of a plain backward. With several
    micro-batches each graph is built anew for each product, so that one of them is in memory at a time: 3 gradients a
    product. Attention runs in PyTorch's math kernel meanwhile, because the fused kernels have no second
    derivative; what runs outside of the context keeps its kernel.

    The right product where it fits into memory. With :func:`~diopt_lightning.bilevel.checkpoint_activations` of a
    model's blocks it takes about a quarter of the memory that activations take, and twice the time.

    Example:
        >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(lambda: (phi * theta**2).sum(), lambda: theta.sum(), [theta], [phi])
        >>> with DoubleBackward().linearize(problem) as linearization:
        ...     linearization.both([torch.tensor([3.0])])
        ([tensor([6.])], [tensor([6.])])
    """

    _inspected = False

    def at(self, problem: BilevelProblem) -> Linearization:
        """Build the graph of the inner gradient, if it is to be kept; see :class:`Product`."""
        linearization = GradientGraph(problem, self.fraction, inspect=not self._inspected)
        self._inspected = True
        return linearization


class GradientGraph(ExactLinearization):
    """Second derivatives from graphs of the gradient; see :class:`DoubleBackward`.

    Args:
        problem: The problem to linearize.
        fraction: Share of the micro-batches that the Hessian is computed on.
        inspect: Whether to look for operations that have no second derivative and do not say so.
    """

    def __init__(self, problem: BilevelProblem, fraction: float = 1.0, inspect: bool = True) -> None:
        super().__init__(problem, fraction)
        self._inspect = inspect
        self._graph = self._build(0) if len(self.parts) == 1 else None

    def _build(self, index: int) -> list[Tensor | None]:
        """Return the gradient of the loss of a micro-batch with respect to theta, with its graph."""
        with second_order():
            loss = self.evaluate(index)
            gradient = torch.autograd.grad(loss, self.problem.inner_parameters, create_graph=True, allow_unused=True)
        check_reached(gradient)
        if self._inspect:
            check_twice_differentiable(gradient)
            self._inspect = False
        return list(gradient)

    def gradient(self) -> Vector:
        """Return the gradient, of the graph that the products use where there is one; see :class:`Linearization`."""
        if self._graph is None:
            return super().gradient()
        return self.problem.average(as_vector(self._graph, self.problem.inner_parameters))

    def derivatives(self, index: int, v: Vector, parameters: Sequence[Tensor]) -> Vector:
        """Differentiate ``<gradient, v>``; see :class:`Linearization`."""
        gradient = self._graph if self._graph is not None else self._build(index)
        # An entry without a graph (its loss is linear in it, or does not reach it) has only zero second derivatives.
        entries = [(g, x.to(g.dtype)) for g, x in zip(gradient, v, strict=True) if g is not None and g.requires_grad]
        products: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if entries:
            outputs, directions = zip(*entries, strict=True)
            # Checkpointed layers run their forward pass again in here.
            with second_order():
                products = torch.autograd.grad(
                    outputs, parameters, directions, retain_graph=self._graph is not None, allow_unused=True
                )
        return as_vector(products, parameters)

    def free(self) -> None:
        """Let go of the graph."""
        self._graph = None


def check_reached(gradient: Sequence[Tensor | None]) -> None:
    """Raise where the inner loss depends on no inner parameter.

    Raises:
        ConfigurationError: If all entries are ``None``.
    """
    if all(entry is None for entry in gradient):
        raise ConfigurationError(
            "`inner_loss` depends on none of the `inner_parameters`: there is nothing to optimize. (Checkpointing with "
            "`use_reentrant=True` hides parameters; with `use_reentrant=False` it does not.)"
        )


def check_twice_differentiable(gradient: Sequence[Tensor | None]) -> None:
    """Raise where the graph of a gradient goes through an operation that is marked as once differentiable.

    ``torch.autograd.grad`` raises there only if the way to its inputs leads through that operation's *inputs*; it takes
    what the operation saved for constants, and the product would be wrong without a word.

    Raises:
        OnceDifferentiableError: If there is one.
    """
    if any(node.name() == "torch::autograd::Error" for node in graph_of(gradient)):
        raise OnceDifferentiableError(
            "the backward pass of a torch.autograd.Function is marked with @once_differentiable"
        )


def graph_of(tensors: Sequence[Tensor | None]) -> Iterator[Node]:
    """Go through the nodes of the graph behind tensors."""
    seen: set[Node] = set()
    stack = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            yield node
