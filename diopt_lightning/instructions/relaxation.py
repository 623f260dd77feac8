"""How a discrete choice among candidates is made differentiable."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions.base import Alternatives, Embed, InstructionEmbeddings


@dataclass(frozen=True)
class Annealed:
    r"""A temperature that falls from ``start`` to ``end`` in equal ratios, and stays there.

    .. math:: \tau_n = \text{start} \left( \frac{\text{end}}{\text{start}} \right)^{\min(n / \text{steps},\, 1)}

    Args:
        start: The temperature before the first step.
        end: The temperature after ``steps`` steps.
        steps: Steps of the optimizer of phi.

    Raises:
        ConfigurationError: If one of them is not positive.

    Example:
        >>> Annealed(start=4.0, end=1.0, steps=2).at(1)
        2.0
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0 and self.steps > 0):
            raise ConfigurationError(
                f"`start`, `end` and `steps` of an annealed temperature must be positive, got {self.start}, {self.end} "
                f"and {self.steps}."
            )

    def at(self, step: int) -> float:
        """The temperature after ``step`` steps."""
        share = min(step / self.steps, 1.0)
        return self.start * float((self.end / self.start) ** share)


class ExemplarSlots(Protocol):
    """What a relaxation has to know of an :class:`~diopt_lightning.instructions.Extractor`, which is made with one."""

    slots: int
    repeats: bool

    def mix(self, task: Tensor, weights: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Mix all candidates of each row's task."""

    def choose(self, task: Tensor, choice: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Take one candidate for each slot."""


class Relaxation(nn.Module, ABC):
    """Turns logits over candidates into instructions.

    Args:
        temperature: Divides the logits; lower is closer to a choice of one. A number, or a schedule over the steps of
            the optimizer of phi. Default: 1, as in the paper.

    Raises:
        ConfigurationError: If the temperature is not positive.
    """

    def __init__(self, temperature: float | Annealed = 1.0) -> None:
        super().__init__()
        if not isinstance(temperature, Annealed) and not temperature > 0:
            raise ConfigurationError(f"`temperature` must be positive, got {temperature}.")
        self._temperature = temperature
        self._steps = 0

    @property
    def temperature(self) -> float:
        """The temperature now."""
        return self._temperature.at(self._steps) if isinstance(self._temperature, Annealed) else self._temperature

    def advance(self) -> None:
        """Count a step of the optimizer of phi."""
        self._steps += 1

    def get_extra_state(self) -> dict[str, int]:
        """Return the number of steps, for the checkpoint."""
        return {"steps": self._steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self._steps = int(state["steps"])
        require_at_least(0, of="the checkpoint", steps=self._steps)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The softmax over the last dimension, that of the candidates."""
        return F.softmax(logits / self.temperature, dim=-1)

    @abstractmethod
    def extract(self, extractor: ExemplarSlots, task: Tensor, logits: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Return the instruction of each instance.

        Args:
            extractor: Holds the candidates.
            task: The task of each instance ``(batch,)``.
            logits: Logits over its candidates ``(batch, slots, candidates)``, minus infinity for those that an instance
                must not choose.
            embed: The backbone's input embedding.
        """


class Mixture(Relaxation):
    """The exemplar in a slot is a weighted mean of all candidates, position by position."""

    @abstractmethod
    def weights(self, logits: Tensor, repeats: bool = False) -> Tensor:
        """Return weights of the shape of ``logits`` that sum to one over the last dimension.

        Args:
            logits: ``(batch, slots, candidates)``.
            repeats: Whether slots may choose the same candidate.
        """

    def extract(self, extractor: ExemplarSlots, task: Tensor, logits: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Mix the candidates; see :class:`Relaxation`."""
        return extractor.mix(task, self.weights(logits, extractor.repeats), embed)


class Soft(Mixture):
    """The softmax: every candidate takes part and gets a gradient.

    A model may learn to read the mixture as it is, and nothing sharpens it then but a temperature that falls. Slots mix
    independently of each other: there is no choice that could be made twice.
    """

    def weights(self, logits: Tensor, repeats: bool = False) -> Tensor:
        """Return the softmax.

        Example:
            >>> Soft().weights(torch.tensor([[[0.0, 0.0]]]))
            tensor([[[0.5000, 0.5000]]])
        """
        return self.probabilities(logits)


class StraightThrough(Mixture):
    """One-hot in the forward pass, softmax in the backward pass (Bengio et al. 2013, as in the paper).

    The gradient is taken at the chosen candidate alone, and may be far from that of another choice.
    """

    def weights(self, logits: Tensor, repeats: bool = False) -> Tensor:
        """Return one-hot weights with the gradient of the softmax.

        Example:
            >>> StraightThrough().weights(torch.tensor([[[0.0, 1.0]]]))
            tensor([[[0., 1.]]])
        """
        logits = without_repetition(logits, repeats)
        return straight_through(self.probabilities(logits), logits.argmax(dim=-1))


class GumbelStraightThrough(Mixture):
    """Straight-through at a choice that is drawn (Jang, Gu and Poole, "Categorical reparameterization", ICLR 2017).

    Gumbel noise on the logits makes the largest of them a draw from their softmax, so that other candidates than the
    likeliest are tried; the backward pass is the softmax of the same noisy logits. The noise is drawn anew for every
    instance of every batch, and is the same in all products of a hypergradient.
    """

    def weights(self, logits: Tensor, repeats: bool = False) -> Tensor:
        """Return one-hot weights with the gradient of the softmax of noisy logits."""
        # Drawn on the CPU: the same for a seed on every machine.
        noise = -torch.empty(logits.shape).exponential_().log().to(logits)
        noisy = without_repetition(logits + noise, repeats)
        return straight_through(self.probabilities(noisy), noisy.argmax(dim=-1))


def straight_through(soft: Tensor, choice: Tensor) -> Tensor:
    """One-hot weights of ``choice`` with the gradient of ``soft``."""
    chosen = F.one_hot(choice, soft.shape[-1]).to(soft.dtype)
    # Added as a difference that is exactly zero, so that the weights are exactly one-hot.
    return chosen + (soft - soft.detach())


class ExpectedLoss(Relaxation):
    r"""The loss is the expectation over the choice, :math:`\sum_j p_j L(\text{candidate}_j)`; not in the paper.

    This is the gradient of the discrete choice itself: every candidate is tried as a whole, so there is no mixture to
    read and no bias. Where the logits are differentiated (in a hypergradient, or in plain backpropagation) the sum is
    exact, over as many rows a batch as there are candidates, or over ``samples`` drawn choices with their probabilities
    among each other,

    .. math:: \sum_{j \in S} \frac{p_j}{\sum_{i \in S} p_i} L(\text{candidate}_j) ,

    which compares them with each other alone. Where the logits are constants (in an inner step) one choice is drawn for
    each instance, at the cost of any other instruction.

    Args:
        temperature: As in every relaxation.
        samples: Choices to draw for each instance, where the logits are differentiated. Default: all candidates,
            which is exact; several slots have too many combinations for that, and need a number here.

    Raises:
        ConfigurationError: If a number is not positive, or ``samples`` is 1, which leaves nothing to compare.
    """

    def __init__(self, temperature: float | Annealed = 1.0, samples: int | None = None) -> None:
        super().__init__(temperature)
        require_at_least(2, of="ExpectedLoss", samples=samples)
        self.samples = samples

    def extract(self, extractor: ExemplarSlots, task: Tensor, logits: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Return several choices with their probabilities, or a drawn one; see :class:`Relaxation`."""
        if extractor.slots > 1 and self.samples is None:
            raise ConfigurationError(
                f"ExpectedLoss sums over all candidates of one slot, and `slots` is {extractor.slots}: give it a "
                "number of `samples`, or use Soft, StraightThrough or GumbelStraightThrough."
            )
        if not (torch.is_grad_enabled() and logits.requires_grad):
            choice, _ = self.draw(logits, 1, extractor.repeats)
            return extractor.choose(task, choice[:, 0], embed)
        if self.samples is None:
            probabilities = self.probabilities(logits.squeeze(1))
            batch, candidates = probabilities.shape
            choice = torch.arange(candidates, device=task.device).repeat(batch).view(batch, candidates, 1)
        else:
            choice, log_probability = self.draw(logits, self.samples, extractor.repeats)
            probabilities = log_probability.softmax(dim=1)
        instance = torch.arange(len(task), device=task.device).repeat_interleave(choice.shape[1])
        chosen = extractor.choose(task[instance], choice.flatten(0, 1), embed)
        return chosen._replace(alternatives=Alternatives(instance, probabilities.flatten()))

    def draw(self, logits: Tensor, number: int, repeats: bool) -> tuple[Tensor, Tensor]:
        """Draw choices for all slots.

        Of one slot, different candidates; of several, one slot after the other, and choices may come up twice.

        Args:
            logits: ``(batch, slots, candidates)``.
            number: Choices of each instance, at most as many as there are candidates for one slot.
            repeats: Whether slots may choose the same candidate.

        Returns:
            Choices ``(batch, number, slots)`` and the logarithms of their probabilities ``(batch, number)``, which are
            differentiable.
        """
        logits = logits / self.temperature
        if logits.shape[1] == 1:
            slot = logits[:, 0]
            possible = int(torch.isfinite(slot).sum(dim=-1).min()) if number > 1 else 1
            # A probability may have been rounded to zero; such a candidate can still be drawn last.
            probability = slot.detach().softmax(dim=-1)
            if number > 1:
                probability = probability + 1e-12 * torch.isfinite(slot)
            choice = torch.multinomial(probability, min(number, possible))
            return choice.unsqueeze(-1), F.log_softmax(slot, dim=-1).gather(1, choice)
        taken = torch.zeros(len(logits), number, logits.shape[-1], dtype=torch.bool, device=logits.device)
        total, choices = torch.zeros(len(logits), number, device=logits.device, dtype=logits.dtype), []
        for slot in logits.unbind(dim=1):
            log_probability = F.log_softmax(slot.unsqueeze(1).masked_fill(taken, -torch.inf), dim=-1)
            choice = torch.multinomial(log_probability.detach().exp().flatten(0, 1), 1).view(len(logits), number, 1)
            total = total + log_probability.gather(2, choice).squeeze(2)
            choices.append(choice.squeeze(2))
            if not repeats:
                taken = taken.scatter(2, choice, True)
        return torch.stack(choices, dim=2), total


def without_repetition(scores: Tensor, repeats: bool) -> Tensor:
    """Rule out, in each slot, the candidates that the slots before it choose.

    Args:
        scores: By which each slot chooses the largest, ``(rows, slots, candidates)``.
        repeats: Whether to rule out nothing.

    Returns:
        The scores with minus infinity for what is ruled out.

    Example:
        >>> without_repetition(torch.tensor([[[2.0, 1.0, 0.0], [3.0, 1.0, 2.0]]]), repeats=False)
        tensor([[[2., 1., 0.],
                 [-inf, 1., 2.]]])
    """
    if repeats or scores.shape[1] == 1:
        return scores
    taken = torch.zeros_like(scores[:, 0], dtype=torch.bool)
    slots = []
    for slot in scores.unbind(dim=1):
        slots.append(slot.masked_fill(taken, -torch.inf))
        taken = taken.scatter(1, slots[-1].argmax(dim=-1, keepdim=True), True)
    return torch.stack(slots, dim=1)
