"""Rows of token ids to a padded batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED_LABEL = -100  # what PyTorch's cross-entropy and transformers leave out of a loss


class Batch(NamedTuple):
    """A batch of instances, tensors only.

    Args:
        input_ids: Source tokens ``(batch, source_length)``, padded at the end.
        attention_mask: 1 on source tokens and 0 on padding ``(batch, source_length)``.
        labels: Target tokens ``(batch, target_length)``, -100 on padding.
        task: Index of each instance's task in the data module's list of tasks ``(batch,)``.
        instance: Position of each instance in its task's file ``(batch,)``; -1 for a row that counts nowhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task: Tensor
    instance: Tensor

    @property
    def target_tokens(self) -> int:
        """Number of target tokens, over which losses are means."""
        return int((self.labels != IGNORED_LABEL).sum())


class Collator:
    """Pads rows to the longest of their batch.

    Args:
        pad_token_id: What stands where a source has ended.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Collate rows with ``input_ids``, ``labels``, ``task`` and ``instance``."""
        return Batch(
            input_ids=pad([row["input_ids"] for row in rows], self.pad_token_id),
            attention_mask=pad([[1] * len(row["input_ids"]) for row in rows], 0),
            labels=pad([row["labels"] for row in rows], IGNORED_LABEL),
            task=torch.tensor([row["task"] for row in rows]),
            instance=torch.tensor([row["instance"] for row in rows]),
        )


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack rows of unequal lengths into ``(rows, longest)``.

    Example:
        >>> pad([[1, 2], [3]], value=0)
        tensor([[1, 2],
                [3, 0]])
    """
    longest = max(map(len, rows))
    # The type is said, because that of rows without tokens would be float.
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)
