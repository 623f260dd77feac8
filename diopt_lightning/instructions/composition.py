"""Several forms of instruction at once."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import Alternatives, Embed, Instruction, InstructionEmbeddings, Tasks, Tokenizer
from diopt_lightning.instructions.description import Description


class Composition(Instruction):
    """Several instructions, one after the other before the input, e.g. a soft prefix and a chosen exemplar.

    Their weights of instances are multiplied. Together with the human-written definition, which the data module's
    ``train_prompt`` puts into the source, a learned and a human instruction stand side by side.

    Args:
        parts: The instructions, in order. One of them at most may be an extractor with
            :class:`~diopt_lightning.instructions.ExpectedLoss`.

    Raises:
        ConfigurationError: If there is no part.

    Example:
        >>> from diopt_lightning.instructions import EmbedderDP, TaskWeights
        >>> Composition([EmbedderDP(length=8), TaskWeights()]).length
        8
    """

    def __init__(self, parts: list[Instruction]) -> None:
        super().__init__()
        if not parts:
            raise ConfigurationError("`parts` of a Composition is empty: give it one instruction at least.")
        self.parts = nn.ModuleList(parts)

    @property
    def instructions(self) -> list[Instruction]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, Instruction)]

    @property
    def length(self) -> int:
        """Positions of all parts."""
        return sum(part.length for part in self.instructions)

    @property
    def has_a_row_for_each_task(self) -> bool:
        """Whether a part has."""
        return any(part.has_a_row_for_each_task for part in self.instructions)

    @property
    def works_on_unseen_tasks(self) -> bool:
        """Whether all parts do."""
        return all(part.works_on_unseen_tasks for part in self.instructions)

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Make the parameters of all parts; see :class:`Instruction`."""
        for part in self.instructions:
            part.build(tasks, tokenizer, embedding, unseen)

    def advance(self) -> None:
        """Count a step in all parts; see :class:`Instruction`."""
        for part in self.instructions:
            part.advance()

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task what each part says of it, under ``parts``, beside the part's ``form``."""
        described = [part.describe(tokenizer, embedding) for part in self.instructions]
        forms = [type(part).__name__ for part in self.instructions]
        return [
            Description(
                rows[0].task, parts=[replace(row, task="", form=form) for form, row in zip(forms, rows, strict=True)]
            )
            for rows in zip(*described, strict=True)
        ]

    def task_embeddings(self, embed: Embed) -> list[Tensor] | None:
        """Return the parts' embeddings of each task in a row; see :class:`Instruction`."""
        return in_a_row([part.task_embeddings(embed) for part in self.instructions])

    def representatives(self, embed: Embed) -> list[Tensor] | None:
        """Return the parts' representatives of each task in a row; see :class:`Instruction`."""
        return in_a_row([part.representatives(embed) for part in self.instructions])

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the parts' embeddings in a row.

        Raises:
            ConfigurationError: If several parts have alternatives.
        """
        found = [part(batch, embed) for part in self.instructions]
        alternatives = only_one(part.alternatives for part in found)
        if alternatives is not None:
            found = [each if each.alternatives is not None else repeated(each, alternatives) for each in found]
        weight: Tensor | None = None
        for part in found:
            if part.weight is not None:
                weight = part.weight if weight is None else weight * part.weight
        return InstructionEmbeddings(
            torch.cat([part.embeddings for part in found], dim=1),
            torch.cat([part.mask for part in found], dim=1),
            alternatives,
            weight,
        )


def in_a_row(parts: Sequence[list[Tensor] | None]) -> list[Tensor] | None:
    """Concatenate what each part has of each task; nothing if a part has none."""
    columns = [part for part in parts if part is not None]
    if len(columns) < len(parts):
        return None
    return [torch.cat(rows) for rows in zip(*columns, strict=True)]


def only_one(alternatives: Iterable[Alternatives | None]) -> Alternatives | None:
    """Return the alternatives of the part that has some.

    Raises:
        ConfigurationError: If several have.
    """
    found = [each for each in alternatives if each is not None]
    if len(found) > 1:
        raise ConfigurationError(
            f"{len(found)} parts of a Composition sum over alternatives, and all combinations would be too many: use "
            "ExpectedLoss in one of them and StraightThrough, GumbelStraightThrough or Soft in the others."
        )
    return found[0] if found else None


def repeated(instruction: InstructionEmbeddings, alternatives: Alternatives) -> InstructionEmbeddings:
    """Give every alternative of an instance the same instruction before or after it."""
    return instruction._replace(
        embeddings=instruction.embeddings[alternatives.instance], mask=instruction.mask[alternatives.instance]
    )
