"""How to differentiate: what a product of the inner loss's second derivatives with a vector is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from diopt_lightning.bilevel.problem import BilevelProblem, differentiable, scalar
from diopt_lightning.bilevel.sharding import any_sharded
from diopt_lightning.bilevel.vectors import Vector, add, as_vector
from diopt_lightning.errors import ConfigurationError


class Linearization(ABC):
    r"""The second derivatives of the inner loss at one point, as products with a vector.

    The inner loss may come in micro-batches, :math:`L = \sum_i w_i L_i`; products are sums over them, and averages
    over processes.

    Args:
        problem: The problem to linearize.
        fraction: Share of the micro-batches, from the first, that the Hessian is computed on. The mixed derivative is
            always computed on all of them.

    Attributes:
        problem: The problem.
        statistics: What the product found out about itself, by name.
    """

    def __init__(self, problem: BilevelProblem, fraction: float = 1.0) -> None:
        self.problem = problem
        self.fraction = fraction
        self.statistics: dict[str, float] = {}
        self.parts = problem.inner_parts()
        used = math.ceil(fraction * len(self.parts))
        share = sum(weight for _, weight in self.parts[:used])
        self.curvature_weights = [weight / share for _, weight in self.parts[:used]]
        self._values: dict[int, Tensor] = {}

    @property
    def inner_loss(self) -> Tensor:
        """The value of the inner loss, a detached scalar."""
        for index in range(len(self.parts)):
            if index not in self._values:
                self.evaluate(index)
        return torch.stack([weight * self._values[i] for i, (_, weight) in enumerate(self.parts)]).sum()

    def evaluate(self, index: int) -> Tensor:
        """Compute the loss of a micro-batch, with its graph, and remember its value."""
        loss = differentiable(scalar(self.parts[index][0](), "inner_loss"), "inner_loss")
        self._values[index] = loss.detach()
        return loss

    def gradient(self) -> Vector:
        r"""Return :math:`\nabla_\theta L_{train}`."""
        parameters = self.problem.inner_parameters
        total = zeros(parameters)
        for index, (_, weight) in enumerate(self.parts):
            gradient = differentiate(self.evaluate(index), self.problem)[: len(parameters)]
            total = add(total, as_vector(gradient, parameters), weight)
        return self.problem.average(total)

    @abstractmethod
    def hessian(self, v: Vector) -> Vector:
        r"""Return :math:`H v` with :math:`H = \partial^2 L_{train} / \partial\theta^2`."""

    @abstractmethod
    def both(self, v: Vector) -> tuple[Vector, Vector]:
        r"""Return :math:`(H v, J^\top v)` with :math:`J = \partial^2 L_{train} / \partial\phi\,\partial\theta`."""

    def free(self) -> None:  # noqa: B027  (some hold nothing)
        """Let go of what the products needed."""


class ExactLinearization(Linearization):
    """Sums exact derivatives over micro-batches and processes; subclasses differentiate one micro-batch."""

    @abstractmethod
    def derivatives(self, index: int, v: Vector, parameters: Sequence[Tensor]) -> Vector:
        r"""Return :math:`\nabla \langle \nabla_\theta L_i, v \rangle` with respect to ``parameters``."""

    def hessian(self, v: Vector) -> Vector:
        """Return ``H v``; see :class:`Linearization`."""
        parameters = self.problem.inner_parameters
        total = zeros(parameters)
        for index, weight in enumerate(self.curvature_weights):
            total = add(total, self.derivatives(index, v, parameters), weight)
        return self.problem.average(total)

    def mixed(self, v: Vector) -> Vector:
        r"""Return :math:`J^\top v` alone."""
        parameters = self.problem.outer_parameters
        total = zeros(parameters)
        for index, (_, weight) in enumerate(self.parts):
            total = add(total, self.derivatives(index, v, parameters), weight)
        return self.problem.average(total)

    def both(self, v: Vector) -> tuple[Vector, Vector]:
        """Return ``(H v, J^T v)`` from one pass over each micro-batch; see :class:`Linearization`."""
        inner, outer = self.problem.inner_parameters, self.problem.outer_parameters
        curvature, mixed = zeros(inner), zeros(outer)
        for index, (_, weight) in enumerate(self.parts):
            if index < len(self.curvature_weights):
                products = self.derivatives(index, v, [*inner, *outer])
                curvature = add(curvature, products[: len(inner)], self.curvature_weights[index])
                mixed = add(mixed, products[len(inner) :], weight)
            else:
                mixed = add(mixed, self.derivatives(index, v, outer), weight)
        averaged = self.problem.average([*curvature, *mixed])
        return averaged[: len(inner)], averaged[len(inner) :]


class Product(ABC):
    """A way to get products with second derivatives; an estimator of hypergradients is given one of these.

    Attributes:
        supports_sharding: Whether inner parameters may be sharded over processes by ``fully_shard`` (FSDP2), under
            which a model has first derivatives alone, and only by ``.backward()``; see :func:`differentiate`.

    Args:
        fraction: Share of the inner loss's micro-batches that the Hessian is computed on: a stochastic, cheaper system.
            The mixed derivative is always computed on all of them. Default: 1, all.

    Raises:
        ConfigurationError: If ``fraction`` is not above 0 and up to 1.
    """

    supports_sharding = False

    def __init__(self, fraction: float = 1.0) -> None:
        if not 0 < fraction <= 1:
            raise ConfigurationError(f"`fraction` must be above 0 and at most 1, got {fraction}.")
        self.fraction = fraction

    @contextmanager
    def linearize(self, problem: BilevelProblem) -> Iterator[Linearization]:
        """Hold what products at the current point need, for as long as the context is open.

        Raises:
            ConfigurationError: If the problem cannot be differentiated in this way (the message names what can), or the
                inner loss is no scalar or depends on none of the inner parameters.
        """
        if any_sharded(problem.inner_parameters) and not self.supports_sharding:
            raise ConfigurationError(
                f"{type(self).__name__} needs second derivatives, which a model that is sharded by `fully_shard` "
                "(FSDP2) does not have: use `FiniteDifference` as the `product`."
            )
        with self.guard():
            linearization = self.at(problem)
            try:
                yield linearization
            finally:
                linearization.free()

    @abstractmethod
    def at(self, problem: BilevelProblem) -> Linearization:
        """Return the linearization of ``problem`` at the current point."""

    def reset(self) -> None:  # noqa: B027  (some remember nothing)
        """Forget what is done once in a run: another one begins."""

    def guard(self) -> AbstractContextManager[None]:
        """Explain errors of PyTorch that mean that a model cannot be differentiated twice."""
        return explained(type(self).__name__)


class OnceDifferentiableError(RuntimeError):
    """The graph of a gradient goes through an operation that is marked as once differentiable."""


ONCE = "an operation of the model is marked as differentiable only once"
# What PyTorch says where a second derivative does not exist, and what it means.
CAUSES = {
    "aot_autograd does not currently support double backward": "a module is compiled by `torch.compile`",
    "torch.compile": "a module is compiled by `torch.compile`",
    "scaled_dot_product": "attention runs in a fused kernel that has no second derivative",
    "flash_attn": "attention runs in a fused kernel that has no second derivative",
    "once_differentiable": ONCE,
    "forward AD": "an operation of the model has no forward derivative",
    "jvp": "an operation of the model has no forward derivative",
    "is not implemented": "an operation of the model has no second derivative",
}


# What it says of its own operations alone: an estimator runs much beside them, which may say anything.
OF_PYTORCH = ("derivative for aten::", "aot_autograd does not currently support double backward")


@contextmanager
def explained(product: str, only: Sequence[str] = ("",)) -> Iterator[None]:
    """Turn PyTorch's errors about missing second derivatives into one that names the cause and what works.

    Errors without any of the words in ``only`` stay as they are.
    """
    try:
        with checkpointing_explained():
            yield
    except RuntimeError as error:  # includes NotImplementedError
        found = (cause for words, cause in CAUSES.items() if words in str(error))
        cause = ONCE if isinstance(error, OnceDifferentiableError) else next(found, None)
        if cause is None or not any(words in str(error) for words in only):
            raise
        raise ConfigurationError(
            f"{product} needs second derivatives, and {cause} ({str(error).strip().splitlines()[0]}). Where it takes "
            "them itself, by `create_graph=True`, compute the loss and both derivatives in "
            "`with diopt_lightning.bilevel.second_order():`. Otherwise use `FiniteDifference` as the `product`, which "
            "needs first derivatives only, or the model's plain form: uncompiled, with PyTorch's own attention (`sdpa` "
            "or `eager`), and checkpointed with `use_reentrant=False`."
        ) from error


@contextmanager
def checkpointing_explained() -> Iterator[None]:
    """Say what to do about reentrant checkpointing, which ``torch.autograd.grad`` does not see through."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise ConfigurationError(
            "Activations are checkpointed in the reentrant way, which gives gradients to `.backward()` only: "
            "checkpoint with `use_reentrant=False`."
        ) from error


def differentiate(loss: Tensor, problem: BilevelProblem) -> list[Tensor | None]:
    """Return the gradients of a loss with respect to inner and then outer parameters; ``None`` where it reaches none.

    Where inner parameters are sharded, the graph holds copies of them that are gathered for the forward pass, and their
    gradients, averages over the processes, come by ``.backward()`` alone. What was in ``.grad`` is there again
    afterwards. (It is lost of parameters that are in neither group and require a gradient: freeze those.)
    """
    parameters = [*problem.inner_parameters, *problem.outer_parameters]
    if not any_sharded(parameters):
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def zeros(parameters: Sequence[Tensor]) -> Vector:
    """The zero vector in the shapes of ``parameters``."""
    return as_vector([None] * len(parameters), parameters)
