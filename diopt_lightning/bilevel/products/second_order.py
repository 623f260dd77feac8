"""Where gradients are differentiated again, which fused kernels and compiled modules do not allow."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Of the process and not of a thread, as the choice of the kernel is: autograd runs the backward pass of a GPU, and what
# is computed again in it, in a thread of its own.
_depth = 0


@contextmanager
def second_order() -> Iterator[None]:
    """Let what is computed in here be differentiated twice.

    Attention runs in PyTorch's math kernel and compiled modules run as they were written, because neither the fused
    kernels nor compiled code have a second derivative. :func:`needs_second_derivatives` is true.

    The products of this package are computed in here by themselves. An estimator of your own that calls
    ``torch.autograd.grad`` with ``create_graph=True`` computes loss, gradient and that one's derivative in here.

    Example:
        >>> query = torch.randn(1, 1, 2, 4, requires_grad=True)
        >>> with second_order():
        ...     loss = torch.nn.functional.scaled_dot_product_attention(query, query, query).square().sum()
        ...     (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        ...     (product,) = torch.autograd.grad(gradient.sum(), query)
        >>> product.shape
        torch.Size([1, 1, 2, 4])
    """
    global _depth
    _depth += 1
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _depth -= 1


def needs_second_derivatives() -> bool:
    """Whether what is computed now will be differentiated twice; see :func:`second_order`."""
    return _depth > 0
