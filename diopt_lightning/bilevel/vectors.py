"""Arithmetic on lists of tensors, one entry for each parameter.

A *vector* here is what the mathematics calls a vector: the concatenation of the gradients of all parameters. It is
kept as a list of tensors, in float32 at least, whatever the precision of the parameters is: a truncated Neumann series
sums many small terms, which bfloat16 would round away.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

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
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)]).sum()


def norm(a: Vector) -> Tensor:
    """Euclidean norm of the concatenated vector as a scalar tensor."""
    size: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(a)))
    return size


def scale(a: Vector, factor: float) -> Vector:
    """Return ``factor * a``."""
    return list(torch._foreach_mul(a, factor))


def add(a: Vector, b: Vector, factor: float = 1.0) -> Vector:
    """Return ``a + factor * b`` in new tensors."""
    return list(torch._foreach_add(a, b, alpha=factor))
