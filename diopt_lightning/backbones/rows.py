"""Rows of a batch: instructions among embedded tokens, and losses of targets."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diopt_lightning.data.collate import IGNORED_LABEL
from diopt_lightning.instructions.base import InstructionEmbeddings


def insert(
    instruction: InstructionEmbeddings, embeddings: Tensor, attention_mask: Tensor, position: int = 0
) -> tuple[Tensor, Tensor]:
    """Put instructions among inputs, behind the first ``position`` of their tokens.

    Args:
        instruction: Embeddings and mask ``(batch, instruction_length, ...)``.
        embeddings: Embedded inputs ``(batch, source_length, dim)``.
        attention_mask: Mask of the inputs ``(batch, source_length)``.
        position: Where instructions enter.

    Returns:
        Embeddings ``(batch, length, dim)`` and attention mask ``(batch, length)`` with gaps, where the mask is 0.
    """
    parts = (embeddings[:, :position], instruction.embeddings.to(embeddings.dtype), embeddings[:, position:])
    masks = (attention_mask[:, :position], instruction.mask.to(attention_mask.dtype), attention_mask[:, position:])
    return torch.cat(parts, dim=1), torch.cat(masks, dim=1)


def compact(mask: Tensor, *columns: Tensor, left: bool = False) -> tuple[Tensor, ...]:
    """Close the gaps in rows.

    Unused positions of an instruction would stand between it and the input, where positions count them. So what is used
    moves together, in order: the model sees what it would see of the same text in one piece.

    Args:
        mask: 1 where something is used ``(batch, length)``.
        *columns: What stands there ``(batch, length)`` or ``(batch, length, dim)``.
        left: Whether rows are padded at their beginning instead of their end.

    Returns:
        The mask and the columns, padded to the longest row.
    """
    longest = int(mask.sum(dim=1).max())
    order = mask.argsort(dim=1, descending=not left, stable=True)
    order = order[:, mask.shape[1] - longest :] if left else order[:, :longest]

    def gathered(column: Tensor) -> Tensor:
        if column.dim() == 2:
            return column.gather(1, order)
        return column.gather(1, order.unsqueeze(-1).expand(-1, -1, column.shape[-1]))

    return tuple(gathered(column) for column in (mask, *columns))


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of each row's target tokens.

    Args:
        logits: ``(rows, length, vocabulary)``.
        labels: ``(rows, length)``, -100 where there is no target.
        label_smoothing: Share of each target's probability that is spread evenly over the vocabulary.

    Returns:
        Losses ``(rows,)`` in nats, in float32 at least.
    """
    # Half precision would round a probability near one to one.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(labels.shape).sum(dim=1)
