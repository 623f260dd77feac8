"""How a discrete choice among candidates is made differentiable."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import Alternatives, Embed, InstructionEmbeddings
from diopt_lightning.instructions.extractor import Extractor


class Relaxation(ABC):
    """Turns logits over candidates into instructions.

    Args:
        temperature: Divides the logits; lower is closer to a choice of one. Default: 1, as in the paper.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ConfigurationError(f"`temperature` must be positive, got {temperature}.")
        self.temperature = temperature

    def probabilities(self, logits: Tensor) -> Tensor:
        """The softmax over the last dimension, that of the candidates."""
        return F.softmax(logits / self.temperature, dim=-1)

    @abstractmethod
    def extract(self, extractor: Extractor, task: Tensor, logits: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Return the instruction of each instance.

        Args:
            extractor: Holds the candidates.
            task: The task of each instance ``(batch,)``.
            logits: Logits over its candidates ``(batch, slots, candidates)``.
            embed: The backbone's input embedding.
        """


class Mixture(Relaxation):
    """The exemplar in a slot is a weighted mean of all candidates, position by position."""

    @abstractmethod
    def weights(self, logits: Tensor) -> Tensor:
        """Return weights of the shape of ``logits`` that sum to one over the last dimension."""

    def extract(self, extractor: Extractor, task: Tensor, logits: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Mix the candidates; see :class:`Relaxation`."""
        return extractor.mix(task, self.weights(logits), embed)


class Soft(Mixture):
    """The softmax: every candidate takes part and gets a gradient.

    A model may learn to read the mixture as it is, and nothing sharpens it then.
    """

    def weights(self, logits: Tensor) -> Tensor:
        """Return the softmax.

        Example:
            >>> Soft().weights(torch.tensor([0.0, 0.0]))
            tensor([0.5000, 0.5000])
        """
        return self.probabilities(logits)


class StraightThrough(Mixture):
    """One-hot in the forward pass, softmax in the backward pass (Bengio et al. 2013, as in the paper).

    The gradient is taken at the chosen candidate alone, and may be far from that of another choice.
    """

    def weights(self, logits: Tensor) -> Tensor:
        """Return one-hot weights with the gradient of the softmax.

        Example:
            >>> StraightThrough().weights(torch.tensor([0.0, 1.0]))
            tensor([0., 1.])
        """
        soft = self.probabilities(logits)
        chosen = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(soft.dtype)
        # Added as a difference that is exactly zero, so that the weights are exactly one-hot.
        return chosen + (soft - soft.detach())


class ExpectedLoss(Relaxation):
    r"""The loss is the expectation over the choice, :math:`\sum_j p_j L(\text{candidate}_j)`; not in the paper.

    This is the gradient of the discrete choice itself: every candidate is tried as a whole, so there is no mixture to
    read and no bias. Where the logits are differentiated (in a hypergradient, or in plain backpropagation) the sum is
    exact, over as many rows a batch as there are candidates. Where they are constants (in an inner step) one candidate
    is drawn for each instance, at the cost of any other instruction. Fills one slot.
    """

    def extract(self, extractor: Extractor, task: Tensor, logits: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Return all candidates with their probabilities, or drawn ones; see :class:`Relaxation`."""
        if extractor.slots != 1:
            raise ConfigurationError(
                f"ExpectedLoss sums over the candidates of one slot, and `slots` is {extractor.slots}: set it to 1, or "
                "use Soft or StraightThrough."
            )
        probabilities = self.probabilities(logits.squeeze(1))
        batch, candidates = probabilities.shape
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return extractor.choose(task, torch.multinomial(probabilities, 1), embed)
        instance = torch.arange(batch, device=task.device).repeat_interleave(candidates)
        choice = torch.arange(candidates, device=task.device).repeat(batch).unsqueeze(1)
        chosen = extractor.choose(task[instance], choice, embed)
        return chosen._replace(alternatives=Alternatives(instance, probabilities.flatten()))
