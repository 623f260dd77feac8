"""Where a round is interrupted: what of it a checkpoint keeps, and how a resumed run goes on from there."""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.resuming.processes import of_this_process
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
        loaded: The state that was loaded, and what the estimator recorded of its steps, until the first batch.
    """

    def __init__(self, inner_steps: int, inner_accumulation: int, outer_accumulation: int, observed_steps: int) -> None:
        self.inner_batches: deque[Any] = deque(maxlen=inner_accumulation)
        self.pairs: deque[Pair] = deque(maxlen=outer_accumulation)
        self.steps: deque[list[Any]] = deque(maxlen=observed_steps)
        self.random: dict[str, Any] | None = None
        self._sizes = inner_steps, inner_accumulation, outer_accumulation, observed_steps
        self.loaded: tuple[dict[str, Any], list[Any]] | None = None
        self._of_others = 0

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

    def load_state_dict(self, processes: list[dict[str, Any]], recorded: list[Any]) -> None:
        """Keep a state, and what the estimator recorded of the steps in it, until a batch tells their structure.

        Args:
            processes: The states of all processes, of which this one takes its own.
            recorded: What the estimator recorded.
        """
        own = of_this_process(processes)
        self.loaded = None if own is None else (own, recorded)
        used_again = any(state[kept] for state in processes for kept in ("inner_batches", "pairs", "steps"))
        self._of_others = len(processes) if own is None and used_again else 0

    def restore(self, inner_batch: Any, outer_batch: Any, device: torch.device) -> list[Any] | None:
        """Fill in what was loaded, once; return what the estimator recorded, or ``None`` where nothing was loaded.

        Raises:
            ConfigurationError: If batches that are used again were dealt to another number of processes.
        """
        if self._of_others:
            raise ConfigurationError(
                f"The checkpoint was written in the middle of a round, whose batches were dealt to {self._of_others} "
                f"process(es), and this run has another number of them: go on with {self._of_others}, or "
                f"{self._where_others_go_on()}."
            )
        if self.loaded is None:
            return None
        (saved, recorded), self.loaded = self.loaded, None
        self.inner_batches.extend(structured_as(inner_batch, batch, device) for batch in saved["inner_batches"])
        for inner, outer in saved["pairs"]:
            pair = structured_as(inner_batch, inner, device), structured_as(outer_batch, outer, device)
            self.pairs.append(pair)
        self.steps.extend([structured_as(inner_batch, batch, device) for batch in step] for step in saved["steps"])
        self.random = saved["random"]
        return recorded

    def _where_others_go_on(self) -> str:
        """From which checkpoints another number of processes goes on, in words."""
        inner_steps, accumulation, _, _ = self._sizes
        free = [step for step in range(inner_steps) if not any(self.still_needed(step * accumulation, step))]
        if not free:
            return "begin anew: the estimator uses inner steps of earlier rounds again, so it works at no step"
        more = f", or {', '.join(map(str, free[1:]))} more" if free[1:] else ""
        return f"from a checkpoint after an inner step whose number is a multiple of {inner_steps}{more}"

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
    """A batch with the structure of another one and the leaves that were saved.

    Raises:
        TypeError: If they are of other kinds.
    """
    own, structure = tree_flatten(batch)
    if [kind(leaf) for leaf in saved] != [kind(leaf) for leaf in own]:
        raise TypeError("a batch of the unfinished round is of another kind than those of this run")
    return tree_unflatten([leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in saved], structure)


def kind(leaf: Any) -> tuple[Any, ...]:
    """The type of what stands in a batch; of a tensor whether it has real numbers, and how many dimensions."""
    return (Tensor, leaf.is_floating_point(), leaf.dim()) if isinstance(leaf, Tensor) else (type(leaf),)
