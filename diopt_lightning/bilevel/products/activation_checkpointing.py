"""Activation checkpointing that also saves memory where a gradient is differentiated again."""

from collections.abc import Sequence
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from diopt_lightning.bilevel.products.recomputation import Body, recomputed
from diopt_lightning.bilevel.products.second_order import needs_second_derivatives
from diopt_lightning.errors import ConfigurationError


def checkpoint_activations(module: nn.Module) -> None:
    r"""Let a module, say a block of a transformer, recompute its activations instead of keeping them, from now on.

    It replaces ``module.forward``. A gradient costs one more forward pass of the module and keeps its inputs alone, by
    ``torch.utils.checkpoint``. That saves little where the gradient is differentiated again, because its graph keeps
    what was recomputed. Products with second derivatives therefore see the module :math:`y = f(x)`, with its parameters
    in :math:`x`, as two functions:

    .. math:: x \mapsto f(x) \quad \text{and} \quad (x, \bar y) \mapsto f'(x)^\top \bar y

    They keep :math:`x` and :math:`\bar y`, and compute the rest again where they are differentiated, so that the
    activations of one module at a time are in memory. A graph of the gradient then costs about 1.3 gradients, and a
    product of :class:`~diopt_lightning.bilevel.DoubleBackward` 4 in place of 2. Its value is the same.

    It works in training as in evaluation mode, with dropout (the mask is drawn again from the same random state),
    autocast, and tied or frozen parameters. What the module returns may depend on its arguments, parameters and buffers
    only, and it may change none of them. What hooks within it record has no derivatives.

    Args:
        module: The module. One that is checkpointed already stays as it is.

    Raises:
        ConfigurationError: When the module is called with gradients, if it takes or returns objects that are neither
            tensors nor constants, if it uses another tensor that requires a gradient, or in forward mode.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> checkpoint_activations(layer)
        >>> layer(torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """
    if not isinstance(module.forward, Recomputed):
        module.forward = Recomputed(module)


class Recomputed:
    """The forward pass of a checkpointed module; see :func:`checkpoint_activations`.

    An object and not a function within a function, so that a copy of the module computes with its own parameters.

    Args:
        module: The module, with the forward pass that it had.
    """

    def __init__(self, module: nn.Module) -> None:
        self._body = Body(module)
        update_wrapper(self, module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in the way that what comes after it needs."""
        if needs_second_derivatives() and torch._C._are_functorch_transforms_active():
            raise ConfigurationError(
                f"{self._body.name} is checkpointed, which forward mode does not see through: use `DoubleBackward` as "
                "the `product`, or do not checkpoint activations."
            )
        given: Sequence[Any] = tree_leaves((args, kwargs))
        tensors = [*self._body.parameters(), *(x for x in given if isinstance(x, Tensor))]
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self._body(*args, **kwargs)
        self._body.check_constants(given)
        if not needs_second_derivatives():
            return checkpoint(partial(self._body, **kwargs), *args, use_reentrant=False)
        return recomputed(self._body, args, kwargs)
