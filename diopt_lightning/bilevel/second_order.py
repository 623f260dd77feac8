"""Where gradients are differentiated again, which not every kernel and not every compiled module allows."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

# Of the process and not of a thread, as the choice of the kernel is: autograd runs the backward pass of a GPU, and what
# is computed again in it, in a thread of its own.
_depth = 0


@contextmanager
def second_order() -> Iterator[None]:
    """Let what is computed in here be differentiated twice.

    Attention runs in PyTorch's math kernel, because the fused kernels have no second derivative, and
    :func:`needs_second_derivatives` is true.
    """
    global _depth
    _depth += 1
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _depth -= 1


def needs_second_derivatives() -> bool:
    """Whether what is computed now will be differentiated twice; see :func:`second_order`."""
    return _depth > 0
