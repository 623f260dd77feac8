"""How a language model takes instruction embeddings."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import IGNORED_LABEL, Batch
from diopt_lightning.instructions.base import InstructionEmbeddings


class Backbone(nn.Module, ABC):
    """A language model whose inputs may begin with embeddings instead of tokens.

    The constructor takes the options; :meth:`build` makes the model once the tokenizer is known.

    Attributes:
        name: Name on the hub, or folder, of the pretrained model; what it is made of where there is none.
    """

    name: str

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The input embedding."""

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the model; does nothing if it is there.

        Raises:
            ConfigurationError: If the model cannot be made, or does not fit the tokenizer.
        """

    @abstractmethod
    def loss(self, batch: Batch, instruction: InstructionEmbeddings | None = None) -> Tensor:
        """Cross-entropy of the targets given ``[instruction ; input]``, the mean over the batch's target tokens.

        Where the instruction has several alternatives for an instance, its loss is their weighted mean. Where it weighs
        instances, their losses are multiplied; the mean is still that over all target tokens.
        """

    @abstractmethod
    def generate(self, batch: Batch, max_new_tokens: int, instruction: InstructionEmbeddings | None = None) -> Tensor:
        """Greedy outputs of ``[instruction ; input]`` as token ids ``(batch, up to max_new_tokens + 1)``.

        The instruction has no alternatives.
        """


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of each row's target tokens.

    Args:
        logits: ``(rows, length, vocabulary)``.
        labels: ``(rows, length)``, -100 where there is no target.

    Returns:
        Losses ``(rows,)`` in nats.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED_LABEL)
    return losses.view(labels.shape).sum(dim=1)


def prepend(instruction: InstructionEmbeddings, embeddings: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put instructions before inputs, without gaps.

    Unused positions of an instruction would stand between it and the input, where relative positions count them. So
    what is used moves to the front, in order: the model sees what it would see of the same text in one piece.

    Args:
        instruction: Embeddings and mask ``(batch, instruction_length, ...)``.
        embeddings: Embedded inputs ``(batch, source_length, dim)``.
        attention_mask: Mask of the inputs ``(batch, source_length)``.

    Returns:
        Embeddings ``(batch, length, dim)`` and attention mask ``(batch, length)``, padded at the end to the longest.
    """
    joined = torch.cat([instruction.embeddings.to(embeddings.dtype), embeddings], dim=1)
    mask = torch.cat([instruction.mask.to(attention_mask.dtype), attention_mask], dim=1)
    longest = int(mask.sum(dim=1).max())
    order = mask.argsort(dim=1, descending=True, stable=True)[:, :longest]
    return joined.gather(1, order.unsqueeze(-1).expand(-1, -1, joined.shape[-1])), mask.gather(1, order)
