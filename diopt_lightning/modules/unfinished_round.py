"""Where a round is interrupted: what of it a checkpoint keeps, and how a resumed run goes on from there."""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diopt_lightning.resuming.random_numbers import drawing_from, random_state

Pair = tuple[Any, Any]


class StillNeeded(NamedTuple):
    """How many batches of an accumulated gradient, pairs and inner steps, the last ones, later steps will use again."""

    inner_batches: int
    pairs: int
    steps: int


class UnfinishedRound:
    """The batches of the present round that will be used again.

    In a checkpoint they are kept as their tensors alone, because it holds plain data; the next batch tells their
    structure. Accumulated gradients are not kept, which are as large as the model: they are computed again, from the
    same batches and random numbers at the same parameters.

    Args:
        inner_steps: Inner steps of a round.
        inner_accumulation: Batches of an inner step.
        outer_accumulation: Pairs of batches of an outer step.
        observed_steps: Inner steps that the estimator uses again.

    Attributes:
        inner_batches: The last batches of the inner level.
        pairs: The last pairs.
        steps: The batches of each of the last inner steps.
        random: The random numbers with which the batches of the present inner step have begun.
    """

    def __init__(self, inner_steps: int, inner_accumulation: int, outer_accumulation: int, observed_steps: int) -> None:
        self.inner_batches: deque[Any] = deque(maxlen=inner_accumulation)
        self.pairs: deque[Pair] = deque(maxlen=outer_accumulation)
        self.steps: deque[list[Any]] = deque(maxlen=observed_steps)
        self.random: dict[str, Any] | None = None
        self._sizes = inner_steps, inner_accumulation, outer_accumulation, observed_steps
        self._saved: tuple[dict[str, Any], list[Any]] | None = None

    def add_batches(self, inner_batch: Any, outer_batch: Any, batches_seen: int, device: torch.device) -> bool:
        """Take in a training step's batches, the latest of ``batches_seen``; return whether an inner step has all."""
        _, accumulation, _, _ = self._sizes
        if accumulation > 1 and batches_seen % accumulation == 1:
            self.random = random_state(device)
        self.pairs.append((inner_batch, outer_batch))
        self.inner_batches.append(inner_batch)
        return batches_seen % accumulation == 0

    def drop_step(self) -> None:
        """Drop the batches and pairs of an inner step that is not taken."""
        for _ in range(min(len(self.inner_batches), len(self.pairs))):
            self.pairs.pop()
        self.inner_batches.clear()

    def still_needed(self, batches_seen: int, steps_taken: int) -> StillNeeded:
        """What a run that goes on will use again, after so many batches of the inner level and inner steps."""
        inner_steps, accumulation, pairs, observed = self._sizes
        accumulated, steps_to_come = batches_seen % accumulation, inner_steps - steps_taken % inner_steps
        pairs_to_come = steps_to_come * accumulation - accumulated
        return StillNeeded(accumulated, max(0, pairs - pairs_to_come), max(0, observed - steps_to_come))

    def state_dict(self, needed: StillNeeded) -> dict[str, Any]:
        """Return what is still needed of this process's batches, as plain data."""
        return {
            "inner_batches": [leaves(batch) for batch in latest(self.inner_batches, needed.inner_batches)],
            "pairs": [[leaves(batch) for batch in pair] for pair in latest(self.pairs, needed.pairs)],
            "steps": [[leaves(batch) for batch in batches] for batches in latest(self.steps, needed.steps)],
            "random": self.random if needed.inner_batches else None,
        }

    def load_state_dict(self, state: dict[str, Any] | None, recorded: list[Any]) -> None:
        """Keep a state, and what the estimator recorded of the steps in it, until a batch tells their structure."""
        self._saved = None if state is None else (state, recorded)

    def restore(self, inner_batch: Any, outer_batch: Any, device: torch.device) -> list[Any] | None:
        """Fill in what was loaded, once; return what the estimator recorded, or ``None`` where nothing was loaded."""
        if self._saved is None:
            return None
        (saved, recorded), self._saved = self._saved, None
        self.inner_batches.extend(structured_as(inner_batch, batch, device) for batch in saved["inner_batches"])
        for inner, outer in saved["pairs"]:
            pair = structured_as(inner_batch, inner, device), structured_as(outer_batch, outer, device)
            self.pairs.append(pair)
        self.steps.extend([structured_as(inner_batch, batch, device) for batch in step] for step in saved["steps"])
        self.random = saved["random"]
        return recorded

    def redrawing(self, device: torch.device) -> AbstractContextManager[None]:
        """Draw the random numbers again with which the batches of the present inner step have begun."""
        return nullcontext() if self.random is None else drawing_from(self.random, device)


def latest(kept: deque[Any], number: int) -> list[Any]:
    """The last ``number`` entries, or all where there are fewer.

    Example:
        >>> latest(deque("abc"), 2), latest(deque("abc"), 0)
        (['b', 'c'], [])
    """
    return list(kept)[max(0, len(kept) - number) :]


def leaves(batch: Any) -> list[Any]:
    """What stands in a batch, without its structure, on the CPU."""
    return [leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in tree_flatten(batch)[0]]


def structured_as(batch: Any, saved: list[Any], device: torch.device) -> Any:
    """A batch with the structure of another one and the leaves that were saved."""
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in saved]
    return tree_unflatten(moved, tree_flatten(batch)[1])
