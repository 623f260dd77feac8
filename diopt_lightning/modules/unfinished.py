"""What an unfinished round has to keep in a checkpoint."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diopt_lightning.resuming.random_numbers import present

Pair = tuple[Any, Any]


class UnfinishedRound:
    """Batches of the present round that will be used again: what a checkpoint in the middle of one has to hold.

    Batches are kept as their tensors alone, because a checkpoint holds plain data; the next batch tells their
    structure. Accumulated gradients are not kept, which are as large as the model: they are computed again, from the
    same batches and random numbers at the same parameters.

    Args:
        accumulated: Batches of an inner step.
        pairs: Pairs of batches of an outer step.
        remembered: Inner steps that the estimator remembers.

    Attributes:
        inner_batches: The last batches of the inner level.
        pairs: The last pairs.
        steps: The batches of each of the last inner steps.
        random: The random numbers with which the batches of the present inner step have begun.
    """

    def __init__(self, accumulated: int, pairs: int, remembered: int) -> None:
        self.inner_batches: deque[Any] = deque(maxlen=accumulated)
        self.pairs: deque[Pair] = deque(maxlen=pairs)
        self.steps: deque[list[Any]] = deque(maxlen=remembered)
        self.random: dict[str, Any] | None = None
        self._saved: dict[str, Any] | None = None

    def begin_step(self, device: torch.device) -> None:
        """Keep the random numbers with which the batches of an inner step begin."""
        if self.inner_batches.maxlen != 1:
            self.random = present(device)

    def forget_step(self) -> None:
        """Drop the batches and pairs of an inner step that is not taken."""
        for _ in range(min(len(self.inner_batches), len(self.pairs))):
            self.pairs.pop()
        self.inner_batches.clear()

    def state(self, accumulated: int, pairs: int, remembered: int) -> dict[str, Any]:
        """Return plain data of so many of the last batches, pairs and steps, of this process."""
        return {
            "inner_batches": [leaves(batch) for batch in last(self.inner_batches, accumulated)],
            "pairs": [[leaves(batch) for batch in pair] for pair in last(self.pairs, pairs)],
            "steps": [[leaves(batch) for batch in batches] for batches in last(self.steps, remembered)],
            "random": self.random if accumulated else None,
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Keep a state for the next batch, which tells the structure of those that are saved."""
        self._saved = state

    def restore(self, inner_batch: Any, outer_batch: Any, device: torch.device) -> bool:
        """Fill in what was loaded, once; return whether there was something."""
        if self._saved is None:
            return False
        saved, self._saved = self._saved, None
        self.inner_batches.extend(like(inner_batch, batch, device) for batch in saved["inner_batches"])
        for one, other in saved["pairs"]:
            self.pairs.append((like(inner_batch, one, device), like(outer_batch, other, device)))
        self.steps.extend([like(inner_batch, batch, device) for batch in batches] for batches in saved["steps"])
        self.random = saved["random"]
        return True


def last(kept: Sequence[Any], number: int) -> list[Any]:
    """The last so many."""
    return list(kept)[len(kept) - min(number, len(kept)) :]


def leaves(batch: Any) -> list[Any]:
    """What a batch consists of, on the CPU."""
    return [leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in tree_flatten(batch)[0]]


def like(batch: Any, saved: list[Any], device: torch.device) -> Any:
    """Give saved leaves the structure of a batch."""
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in saved]
    return tree_unflatten(moved, tree_flatten(batch)[1])
