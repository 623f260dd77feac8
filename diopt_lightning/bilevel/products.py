"""How to differentiate: the products of the inner loss's second derivatives with a vector."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.vectors import Vector, as_vector


class Linearization(ABC):
    r"""The second derivatives of the inner loss at one point, as products with a vector.

    Attributes:
        inner_loss: The value of the inner loss at this point, a detached scalar.
    """

    inner_loss: Tensor

    @abstractmethod
    def hessian(self, v: Vector) -> Vector:
        r"""Return :math:`H v` with :math:`H = \partial^2 L_{train} / \partial\theta^2`."""

    @abstractmethod
    def both(self, v: Vector) -> tuple[Vector, Vector]:
        r"""Return :math:`(H v, J^\top v)` with :math:`J = \partial^2 L_{train} / \partial\phi\,\partial\theta`."""


class Product(ABC):
    """A way to get products with second derivatives; an estimator of hypergradients is given one of these."""

    @abstractmethod
    def linearize(self, problem: BilevelProblem) -> AbstractContextManager[Linearization]:
        """Evaluate the inner loss and hold what its products need for as long as the context is open."""


class DoubleBackward(Product):
    r"""Exact products by differentiating the gradient again.

    .. math:: (H v, J^\top v) = \nabla_{(\theta, \phi)} \langle \nabla_\theta L_{train}, v \rangle

    One graph of the gradient is built, serves all products and is freed when the context closes. It costs about 1.2
    gradients to build and 1.8 for each product, and holds about three times the activations of a plain backward.
    Attention runs in PyTorch's math kernel meanwhile, because the fused kernels have no second derivative; what runs
    outside of the context keeps its kernel.

    Example:
        >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(lambda: (phi * theta**2).sum(), lambda: theta.sum(), [theta], [phi])
        >>> with DoubleBackward().linearize(problem) as linearization:
        ...     linearization.both([torch.tensor([3.0])])
        ([tensor([6.])], [tensor([6.])])
    """

    @contextmanager
    def linearize(self, problem: BilevelProblem) -> Iterator[Linearization]:
        """Build the graph of the inner gradient; see :class:`Product`.

        Raises:
            ValueError: If the inner loss is no scalar or depends on none of the inner parameters.
        """
        linearization = _GradientGraph(problem)
        try:
            yield linearization
        finally:
            linearization.free()


class _GradientGraph(Linearization):
    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = problem
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = scalar(problem.inner_loss(), "inner_loss")
            gradient = torch.autograd.grad(loss, problem.inner_parameters, create_graph=True, allow_unused=True)
        if all(entry is None for entry in gradient):
            raise ValueError("`inner_loss` depends on none of the `inner_parameters`: there is nothing to optimize.")
        self.inner_loss = loss.detach()
        # An entry without a graph (its loss is linear in it, or does not reach it) has only zero second derivatives.
        self._gradient = [entry if entry is not None and entry.requires_grad else None for entry in gradient]

    def hessian(self, v: Vector) -> Vector:
        return self._products(v, self._problem.inner_parameters)

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        inner = self._problem.inner_parameters
        products = self._products(v, [*inner, *self._problem.outer_parameters])
        return products[: len(inner)], products[len(inner) :]

    def _products(self, v: Vector, parameters: Sequence[Tensor]) -> Vector:
        """Differentiate ``<gradient, v>`` with respect to ``parameters``."""
        entries = [(g, entry.to(g.dtype)) for g, entry in zip(self._gradient, v, strict=True) if g is not None]
        products: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if entries:
            outputs, directions = zip(*entries, strict=True)
            # Checkpointed layers run their forward pass again in here.
            with sdpa_kernel(SDPBackend.MATH):
                products = torch.autograd.grad(outputs, parameters, directions, retain_graph=True, allow_unused=True)
        return self._problem.average(as_vector(products, parameters))

    def free(self) -> None:
        self._gradient = []


def scalar(loss: Tensor, name: str) -> Tensor:
    """Return ``loss`` as a zero-dimensional tensor.

    Raises:
        ValueError: If it is no tensor of one element with a gradient graph.
    """
    if not isinstance(loss, Tensor):
        raise ValueError(f"`{name}` returned {type(loss).__name__}, expected a scalar tensor.")
    if loss.numel() != 1:
        raise ValueError(
            f"`{name}` returned a tensor of shape {tuple(loss.shape)}: reduce it to a scalar (mean or sum)."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"`{name}` returned a tensor without a gradient graph: it was computed under `no_grad` or "
            "`inference_mode`, was detached, or depends on no parameter."
        )
    return loss.reshape(())
