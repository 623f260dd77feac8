"""The same exemplars for all instances of a task: nothing is learned."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions.base import Embed, Tasks, Tokenizer
from diopt_lightning.instructions.description import Description
from diopt_lightning.instructions.extractor import RandomExemplar


class FixedExemplar(RandomExemplar):
    """Exemplars of the task that stay the same: drawn once for each task, or the candidates with a given index.

    A baseline of an extractor, with the same candidates. An instance that is its task's exemplar itself gets the one
    after it.

    Args:
        args: ``slots``, ``candidates``, ``candidate_length`` and ``pool``, as of every extractor.
        index: Which candidate of each task stands in the first slot, counted from 0 in the order of the ``pool``; those
            after it stand in the others, and after the last comes the first again. Default: those that are drawn.
        seed: Seed of the draw. A task's exemplars do not depend on the other tasks.
        options: The first ones by name.

    Raises:
        ConfigurationError: If ``index`` is negative, or a task has no such candidate.

    Example:
        >>> FixedExemplar(slots=2, candidates=4, index=1).slots
        2
    """

    order: Tensor

    def __init__(self, *args: Any, index: int | None = None, seed: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        require_at_least(0, of="a fixed exemplar", index=index)
        self.index = index
        self.seed = seed

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Tokenize the candidates and choose among them; see :class:`Instruction`."""
        super().build(tasks, tokenizer, embedding, unseen)
        order = torch.full(self.available.shape, -1.0)
        for row, task in enumerate([*tasks, *unseen]):
            number = len(self.candidate_rows[row])
            if self.index is not None and self.index >= number:
                raise ConfigurationError(
                    f"`index` of a fixed exemplar is {self.index}, and the task `{task.name}` has {number} candidates, "
                    "counted from 0: lower it, or let the `pool` take more kinds of candidates."
                )
            if self.index is None:
                ranked = random.Random(f"exemplars/{self.seed}/{task.name}").sample(range(number), number)
            else:
                ranked = [(self.index + place) % number for place in range(number)]
            for place, candidate in enumerate(ranked):
                order[row, candidate] = 1 - place / number
        # Not in the checkpoint: it follows from the data.
        self.register_buffer("order", order.to(embedding.weight.device), persistent=False)

    def ranks(self, batch: Batch) -> Tensor:
        """How early each candidate of each instance's task comes; see :class:`RandomExemplar`."""
        return self.order[batch.task]

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task its exemplars, each with probability one; see :meth:`described`."""
        return self.described(self._certain())

    @torch.no_grad()
    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Return each task's exemplars; see :class:`Instruction`."""
        return self.likeliest(self._certain(), embed)

    def _certain(self) -> Tensor:
        """One-hot probabilities ``(tasks, slots, candidates)`` of the train tasks."""
        chosen = self.order[: len(self.task_names)].topk(self.slots).indices
        return nn.functional.one_hot(chosen, self.candidates).float()
