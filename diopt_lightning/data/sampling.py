"""Which instances stand in which batch: a pure function of the seed and the step."""

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, cast

import torch
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from diopt_lightning.data.collate import IGNORED_LABEL, Batch, Collator
from diopt_lightning.data.workers import HoldingSignalsBack, leave_signals_to_the_main_process
from diopt_lightning.errors import ConfigurationError, require_at_least

Draw = tuple[int, int]
"""The index of a row, and a random number by which one of its references is chosen; or ``FILLING``."""

# In the place of that number: the row is computed so that its process keeps step with others, and counts nowhere.
FILLING = -1

# Batches among which instances are sorted by length. Fewer leave more padding, more make batches less random.
GROUPED_BATCHES = 50


class TrainSampler(DistributedSampler[list[Draw]], SequentialSampler):
    """An endless stream of length-grouped batches, shuffled anew in every pass over the rows.

    The batch at a step depends on the seed and the step alone: neither on when the stream was started, nor on workers
    or what was drawn before. The last batch of a pass is filled up from its beginning, so that no row is left out.

    It is a :class:`~torch.utils.data.DistributedSampler`, so that Lightning does not put another one around it, and a
    :class:`~torch.utils.data.SequentialSampler`, so that ``overfit_batches`` does not put one in its place.

    Args:
        lengths: Length of each row.
        batch_size: Rows in a batch of one process.
        seed: Seed of the order.
        num_batches: Batches of an epoch, as the ``len`` of this sampler. Default: one pass over the rows.
        num_replicas: Number of processes, each of which gets its own part of the global batch.
        rank: Index of this process.

    Attributes:
        start: The step at which the next iterator begins.
        repeated: How many of the first batches to repeat forever; 0 for all batches of every pass.

    Example:
        >>> sampler = TrainSampler(lengths=[3, 1, 2, 4], batch_size=2, seed=0)
        >>> stream = iter(sampler)
        >>> sorted(index for _ in range(2) for index, _ in next(stream))
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        num_batches: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(cast(Any, range(len(lengths))), num_replicas=num_replicas, rank=rank, seed=seed)
        require_at_least(1, batch_size=batch_size)
        self.lengths = lengths
        self.batch_size = batch_size
        self.start = 0
        self.repeated = 0
        self.pass_length = -(-len(lengths) // (batch_size * num_replicas))
        self.num_batches = num_batches if num_batches is not None else self.pass_length
        self._order: tuple[int, list[list[int]]] | None = None

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        for step in count(self.start):
            yield self.batch(step)

    def __len__(self) -> int:
        return self.num_batches

    def repeat(self, batches: float) -> None:
        """Repeat the first batches forever, a number or a share of an epoch's; all of every pass for zero."""
        self.repeated = batches if isinstance(batches, int) else int(batches * len(self))

    def batch(self, step: int) -> list[Draw]:
        """The batch of this process at a step."""
        step = step % self.repeated if self.repeated else step
        epoch, position = divmod(step, self.pass_length)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._shuffle(epoch))
        generator = random.Random(f"references/{self.seed}/{step}")
        draws = [(index, generator.getrandbits(31)) for index in self._order[1][position]]
        return draws[self.rank :: self.num_replicas]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        """The global batches of one pass."""
        generator = random.Random(f"order/{self.seed}/{epoch}")
        indices = list(range(len(self.lengths)))
        generator.shuffle(indices)
        size = self.batch_size * self.num_replicas
        missing = self.pass_length * size - len(indices)
        # Few rows may have to be repeated more than once to fill a batch.
        indices += (indices * -(-missing // len(indices)))[:missing]
        window = GROUPED_BATCHES * size
        batches = []
        for begin in range(0, len(indices), window):
            grouped = sorted(indices[begin : begin + window], key=self.lengths.__getitem__)
            batches += [grouped[first : first + size] for first in range(0, len(grouped), size)]
        generator.shuffle(batches)
        return batches


class EvaluationSampler(DistributedSampler[list[Draw]], SequentialSampler):
    """Every row once, longest first; rows are dealt to the processes in turn, without repeating any.

    All processes have equally many batches, because they run together: one that has run out of rows, or has none, gets
    batches of a row that does not count (an ``instance`` of -1).

    Args:
        lengths: Length of each row.
        batch_size: Rows in a batch.
        num_replicas: Number of processes.
        rank: Index of this process.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Any, range(len(lengths))), num_replicas=num_replicas, rank=rank, shuffle=False)
        require_at_least(1, evaluation_batch_size=batch_size)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        mine = [(index, 0) for index in order[rank::num_replicas]]
        self.batches = [mine[begin : begin + batch_size] for begin in range(0, len(mine), batch_size)]
        most = -(-len(order[::num_replicas]) // batch_size)
        self.batches += [[(order[-1], FILLING)]] * (most - len(self.batches))

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class TokenRows(Dataset[list[dict[str, Any]]]):
    """Rows of token ids by lists of draws, with one reference chosen for each.

    Args:
        rows: A dataset made by :func:`~diopt_lightning.data.tokenization.tokenize`.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draws: list[Draw]) -> list[dict[str, Any]]:
        columns = self.rows[[index for index, _ in draws]]
        return [
            {
                "input_ids": columns["input_ids"][i],
                "labels": columns["targets"][i][number % len(columns["targets"][i])],
                "task": columns["task"][i],
                "instance": columns["instance"][i] if number != FILLING else -1,
            }
            for i, (_, number) in enumerate(draws)
        ]


class ResumableDataLoader(HoldingSignalsBack):
    """A data loader over a :class:`TrainSampler` that goes on where a checkpoint was written.

    Lightning keeps the state of loaders with ``state_dict`` and ``load_state_dict`` in its checkpoints. The state is
    the number of batches handed out, which workers that fetch ahead do not change.

    Args:
        dataset: Rows by lists of draws.
        sampler: The stream of batches.
        collate_fn: Makes a batch of a list of rows.
        num_workers: Processes that fetch ahead.
        pin_memory: Whether to copy batches into pinned memory.
    """

    def __init__(
        self, dataset: TokenRows, sampler: TrainSampler, collate_fn: Any, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        self.handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.sampler.start = self.handed_out  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from the position of :meth:`state_dict`."""
        self.handed_out = state["handed_out"]


def check_positions(state: Any) -> None:
    """Check what a checkpoint says of the positions of loaders.

    Raises:
        ConfigurationError: If it says something else.
    """
    for place in state.values() if isinstance(state, dict) else [None]:
        if not isinstance(place, dict) or type(place.get("handed_out")) is not int:
            raise ConfigurationError("The checkpoint does not say where its run was in the data: give another one.")


def longest_batch(rows: Any, number: int, pad_token_id: int, end_token_id: int) -> Batch:
    """A batch as large as batches of a data set get, for what must know the worst case.

    Its sources are the longest ones, each of another task where there are enough; its targets are filled up to the
    longest of the whole set, because in a long run some batch has both. The longest row comes first; where the set has
    too few tasks, rows repeat.
    """
    lengths, tasks = rows["length"][:], rows["task"][:]
    longest = {tasks[index]: index for index in sorted(range(len(lengths)), key=lengths.__getitem__)}
    order = sorted(longest.values(), key=lengths.__getitem__, reverse=True)
    draws = [(order[row % len(order)], 0) for row in range(number)]
    batch = Collator(pad_token_id)(TokenRows(rows)[draws])
    missing = max(len(ids) for targets in rows["targets"][:] for ids in targets) - batch.labels.shape[1]
    labels = torch.nn.functional.pad(batch.labels, (0, missing), value=IGNORED_LABEL)
    return batch._replace(labels=labels.where(labels != IGNORED_LABEL, end_token_id))
