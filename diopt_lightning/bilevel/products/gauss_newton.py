"""The positive semidefinite curvature of a convex loss of a network's outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products.base import Linearization, Product, zeros
from diopt_lightning.bilevel.products.double_backward import GradientGraph, check_reached
from diopt_lightning.bilevel.products.second_order import second_order
from diopt_lightning.bilevel.vectors import Vector, add, as_vector
from diopt_lightning.errors import ConfigurationError

# Losses of PyTorch that are convex in their first argument.
CONVEX = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)


class GaussNewton(Product):
    r"""The generalized Gauss-Newton matrix in place of the Hessian.

    (Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 2002;
    Martens, "New insights and perspectives on the natural gradient method", JMLR 2020.) With the outputs
    :math:`z(\theta, \phi)` of the network and :math:`L_{train} = \ell(z, \theta, \phi)`,

    .. math:: G v = \left( \frac{\partial (z, \theta)}{\partial \theta} \right)^{\!\top}
              \nabla^2_{(z, \theta)} \ell \; \frac{\partial (z, \theta)}{\partial \theta} \, v

    It drops the curvature of the network and keeps that of the loss. Where :math:`\ell` is convex, as a cross-entropy
    with a weight decay is, :math:`G` is positive semidefinite: every solver is stable on it, even far from a minimum,
    and at a fit that leaves no error it equals :math:`H`. The mixed term :math:`J^\top v` is the exact one, so only
    the solve is approximated.

    The outputs are what ``inner_loss`` hands to ``torch.nn.functional.cross_entropy``, ``mse_loss`` or
    ``binary_cross_entropy_with_logits`` (also by way of ``torch.nn`` or transformers), so nothing needs to be declared.
    A product costs about 1.3 gradients, the last one 4 more for the mixed term, and memory is about five times that of
    a plain backward.

    Raises:
        ConfigurationError: If ``inner_loss`` uses none of the three functions.

    Example:
        >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> def inner_loss():  # (theta^2 - phi)^2: the Hessian is 12 theta^2 - 4 phi, and without z'' it is 8 theta^2
        ...     return F.mse_loss(theta**2, phi)
        >>> problem = BilevelProblem(inner_loss, lambda: theta.sum(), [theta], [phi])
        >>> with GaussNewton().linearize(problem) as linearization:
        ...     linearization.both([torch.tensor([1.0])])
        ([tensor([8.])], [tensor([-4.])])
    """

    _inspected = False

    def at(self, problem: BilevelProblem) -> Linearization:
        """Build the graphs of the outputs and of the loss, if they are to be kept; see :class:`Product`."""
        linearization = _GaussNewton(problem, self.fraction, inspect=not self._inspected)
        self._inspected = True
        return linearization


class _GaussNewton(Linearization):
    def __init__(self, problem: BilevelProblem, fraction: float, inspect: bool) -> None:
        super().__init__(problem, fraction)
        self._inspect = inspect
        self._graphs = self._build(0) if len(self.parts) == 1 else None

    def _build(self, index: int) -> "_Split":
        with second_order():
            with OutputsOfTheNetwork() as network:
                loss = self.evaluate(index)
            return _Split(loss, network, self.problem.inner_parameters)

    def hessian(self, v: Vector) -> Vector:
        total = zeros(self.problem.inner_parameters)
        for index, weight in enumerate(self.curvature_weights):
            split = self._graphs if self._graphs is not None else self._build(index)
            # Checkpointed layers run their forward pass again in here.
            with second_order():
                total = add(total, split.product(v), weight)
        return self.problem.average(total)

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        return self.hessian(v), GradientGraph(self.problem, inspect=self._inspect).mixed(v)

    def free(self) -> None:
        self._graphs = None


class OutputsOfTheNetwork(TorchFunctionMode):
    """Cuts the graph of a loss where outputs of the network enter a convex loss function.

    Attributes:
        outputs: The outputs, with the graph of the network behind them.
        leaves: Their stand-ins in the graph of the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``; where it is one of the losses, on stand-ins of the outputs."""
        kwargs = dict(kwargs or {})
        if func in CONVEX:
            outputs, *rest = args if args else (kwargs.pop("input"),)
            if outputs.requires_grad:
                self.outputs.append(outputs)
                self.leaves.append(outputs.detach().requires_grad_())
                outputs = self.leaves[-1]
            args = (outputs, *rest)
        return func(*args, **kwargs)


class _Split:
    """The graph of a loss in two parts, from the outputs on and up to them."""

    def __init__(self, loss: Tensor, network: OutputsOfTheNetwork, parameters: Sequence[Tensor]) -> None:
        self._outputs, self._parameters = network.outputs, parameters
        self._arguments = [*network.leaves, *parameters]
        gradient = torch.autograd.grad(loss, self._arguments, create_graph=True, allow_unused=True)
        if all(entry is None for entry in gradient[: len(network.leaves)]):
            raise ConfigurationError(
                "GaussNewton found no outputs of a network: `inner_loss` uses none of torch.nn.functional's "
                "cross_entropy, mse_loss and binary_cross_entropy_with_logits. Write it with one of them, or use "
                "`DoubleBackward` as the `product`."
            )
        self._gradient = gradient
        # The pull-back J^T w is linear in w, so its derivative with respect to w gives J v by reverse mode alone.
        self._cotangents = [torch.zeros_like(output, requires_grad=True) for output in self._outputs]
        self._pulled = torch.autograd.grad(
            self._outputs, parameters, self._cotangents, create_graph=True, allow_unused=True
        )
        check_reached([*self._pulled, *gradient[len(network.leaves) :]])

    def product(self, v: Vector) -> Vector:
        v = [entry.to(parameter.dtype) for entry, parameter in zip(v, self._parameters, strict=True)]
        pushed = vector_jacobian(self._pulled, self._cotangents, v)
        second = vector_jacobian(self._gradient, self._arguments, [*pushed, *v])
        outputs = len(self._outputs)
        pulled = vector_jacobian(self._outputs, self._parameters, second[:outputs])
        return as_vector([a + b for a, b in zip(pulled, second[outputs:], strict=True)], self._parameters)


def vector_jacobian(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Pull ``directions`` at ``outputs`` back to ``inputs``; zeros where nothing leads there."""
    pairs = [(y, w) for y, w in zip(outputs, directions, strict=True) if y is not None and y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    reached, directions = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(reached, inputs, directions, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
