"""What a learnable instruction is: task and instance in, embeddings and mask out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.tasks import Task
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.description import Description

Tasks = Sequence[Task]
Tokenizer = PreTrainedTokenizerBase
Embed = Callable[[Tensor], Tensor]
"""The backbone's input embedding: ids ``(...)`` to vectors ``(..., dim)``."""


class Alternatives(NamedTuple):
    """Several instructions for an instance, whose losses are averaged.

    Args:
        instance: Which instance of the batch each row belongs to ``(rows,)``.
        weight: What the row's loss counts ``(rows,)``; the weights of an instance sum to one.
    """

    instance: Tensor
    weight: Tensor


class InstructionEmbeddings(NamedTuple):
    """Instructions of a batch, to be put before the embeddings of its inputs.

    Args:
        embeddings: ``(rows, length, dim)``.
        mask: True where there is a vector ``(rows, length)``; others are left out.
        alternatives: What the rows are, where there are several for an instance. Default: row i is for instance i.
        weight: What the loss of each instance counts ``(batch,)``. Default: one.
    """

    embeddings: Tensor
    mask: Tensor
    alternatives: Alternatives | None = None
    weight: Tensor | None = None


class Instruction(nn.Module, ABC):
    """A learnable instruction: its parameters are the outer parameters phi.

    They stay in float32 (or float64) whatever the precision of the model is: a learning rate of 1e-2 moves them by less
    than half precision can hold.

    It is made in two steps. The constructor takes the options; :meth:`build` makes the parameters once the train tasks,
    the tokenizer and the backbone's embedding are known.
    """

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions that the longest instruction takes before the input."""

    @property
    def works_on_unseen_tasks(self) -> bool:
        """Whether it has an instruction for tasks that it did not learn from, as what an instance is converted to."""
        return False

    @property
    def task_parameter(self) -> str | None:
        """Name of the parameter whose rows are :meth:`task_embeddings`, if it has one: a checkpoint is enough then."""
        return None

    @property
    def has_a_row_for_each_task(self) -> bool:
        """Whether parameters belong to single train tasks, so that they mean nothing for another list of tasks."""
        return True

    @abstractmethod
    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Make the parameters.

        Args:
            tasks: The train tasks, in the order in which a batch's ``task`` counts them.
            tokenizer: The backbone's tokenizer.
            embedding: The backbone's input embedding, for its width and for initial values.
            unseen: Tasks that it is used on and does not learn from; a batch's ``task`` counts them after ``tasks``.

        Raises:
            ConfigurationError: If an option does not fit the tasks.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply what moves or converts parameters, but never round them to half precision."""

        def in_single_precision(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            halved = converted.is_floating_point() and torch.finfo(converted.dtype).bits < 32
            return tensor.to(converted.device) if halved else converted

        return super()._apply(in_single_precision, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def advance(self) -> None:
        """Count a step of the optimizer of phi, which schedules follow."""

    @abstractmethod
    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return what was learned, to read: a record for each train task, in order."""

    def task_embeddings(self, embed: Embed) -> list[Tensor] | None:
        """Return the instruction of each train task, ``(length, dim)`` without padding.

        A discrete choice is that of the likeliest. ``None`` where instructions depend on the instance.
        """
        return None

    def representatives(self, embed: Embed) -> list[Tensor] | None:
        """Return an instruction that stands for each train task where tasks are compared, ``(length, dim)``.

        That is the task's own, or, of a form that depends on the instance, one for its first instances.
        """
        return self.task_embeddings(embed)

    def rows(self, task: Tensor, names: Sequence[str]) -> Tensor:
        """Return ``task`` as indices of rows for the tasks ``names``.

        Raises:
            ConfigurationError: If a task has no row.
        """
        # On a GPU the look would wait for it; there, an index out of range is PyTorch's own error.
        if task.device.type == "cpu" and len(task) and int(task.max()) >= len(names):
            raise ConfigurationError(
                f"{type(self).__name__} has free parameters for each of its {len(names)} train tasks and none for the "
                f"task with index {int(task.max())}: use a form that is computed from an instance (`EmbedderIC`, "
                "`ExtractorIC`) on unseen tasks."
            )
        return task

    @abstractmethod
    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the instruction of each instance of the batch."""


def outer_dtype(embedding: nn.Embedding) -> torch.dtype:
    """Precision of an instruction beside a model with this embedding: float32 at least."""
    return torch.promote_types(embedding.weight.dtype, torch.float32)


def embedded(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Vectors ``(..., dim)`` of ids ``(...)`` as the model sees them, in float32 at least.

    Not rows of the weight, which some models scale.
    """
    vectors: Tensor = embedding(ids)
    return vectors.to(outer_dtype(embedding))
