"""How a discrete choice is made differentiable."""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional as F

from diopt_lightning.errors import ConfigurationError


class Relaxation(ABC):
    """Turns logits into weights over candidates.

    Args:
        temperature: Divides the logits; lower is closer to a choice of one. Default: 1, as in the paper.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ConfigurationError(f"`temperature` must be positive, got {temperature}.")
        self.temperature = temperature

    @abstractmethod
    def __call__(self, logits: Tensor) -> Tensor:
        """Return weights of the shape of ``logits`` ``(..., candidates)`` that sum to one over the last dimension."""


class Soft(Relaxation):
    """The softmax: the exemplar is a mixture of all candidates, each of which gets a gradient."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the softmax.

        Example:
            >>> Soft()(torch.tensor([0.0, 0.0]))
            tensor([0.5000, 0.5000])
        """
        return F.softmax(logits / self.temperature, dim=-1)


class StraightThrough(Relaxation):
    """One-hot in the forward pass, softmax in the backward pass (Bengio et al. 2013, as in the paper)."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return one-hot weights with the gradient of the softmax.

        Example:
            >>> StraightThrough()(torch.tensor([0.0, 1.0]))
            tensor([0., 1.])
        """
        soft = F.softmax(logits / self.temperature, dim=-1)
        chosen = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(soft.dtype)
        # Added as a difference that is exactly zero, so that the weights are exactly one-hot.
        return chosen + (soft - soft.detach())
