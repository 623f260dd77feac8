"""Arithmetic on lists of tensors, one entry for each parameter.

A *vector* here is what the mathematics calls a vector: the concatenation of the gradients of all parameters. It is
kept as a list of tensors, in float32 at least, whatever the precision of the parameters is: a truncated Neumann series
sums many small terms, which bfloat16 would round away. Entries for sharded parameters are sharded themselves; sums over
them are those over all processes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from diopt_lightning.bilevel.sharding import everywhere, joined, shards

Vector = list[Tensor]

Average = Callable[[Vector], Vector]
"""Averages a vector over processes; the identity on one process."""


def identity(vector: Vector) -> Vector:
    """Return ``vector``: the average over a single process."""
    return vector


def as_vector(tensors: Iterable[Tensor | None], parameters: Sequence[Tensor]) -> Vector:
    """Detach gradients, fill in zeros for ``None`` and raise half precision to float32."""
    return [
        torch.zeros_like(parameter, dtype=solver_dtype(parameter))
        if tensor is None
        else tensor.detach().to(solver_dtype(parameter))
        for tensor, parameter in zip(tensors, parameters, strict=True)
    ]


def solver_dtype(parameter: Tensor) -> torch.dtype:
    """Precision of a vector's entry for ``parameter``: float32, or the parameter's own where that is wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


def dot(a: Vector, b: Vector) -> Tensor:
    """Inner product ``<a, b>`` as a scalar tensor."""
    return everywhere([product.sum() for product in torch._foreach_mul(shards(a), shards(b))], a).sum()


def norm(a: Vector) -> Tensor:
    """Euclidean norm of the concatenated vector as a scalar tensor."""
    size: Tensor = torch.linalg.vector_norm(everywhere(torch._foreach_norm(shards(a)), a))
    return size


def scale(a: Vector, factor: float) -> Vector:
    """Return ``factor * a``."""
    return joined(torch._foreach_mul(shards(a), factor), a)


def add(a: Vector, b: Vector, factor: float = 1.0) -> Vector:
    """Return ``a + factor * b`` in new tensors."""
    return joined(torch._foreach_add(shards(a), shards(b), alpha=factor), a)


def multiply(a: Vector, b: Vector) -> Vector:
    """Return the product of ``a`` and ``b``, entry by entry."""
    return joined(torch._foreach_mul(shards(a), shards(b)), a)


def divide(a: Vector, b: Vector, plus: float) -> Vector:
    """Return ``a / (b + plus)``, entry by entry."""
    return joined(torch._foreach_div(shards(a), torch._foreach_add(shards(b), plus)), a)


def mean(a: Vector) -> Tensor:
    """Mean of all numbers of the vector as a scalar tensor."""
    return everywhere([entry.sum() for entry in shards(a)], a).sum() / sum(entry.numel() for entry in a)
