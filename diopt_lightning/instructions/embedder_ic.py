"""The instruction embedder by instance conversion, and what it shares with others that convert a text."""

from functools import partial

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch
from diopt_lightning.instructions.base import Embed, Instruction, InstructionEmbeddings, Tasks, Tokenizer, embedded
from diopt_lightning.instructions.conversion import Conversion, Linear, example_batch, instance_tokens
from diopt_lightning.instructions.description import Description
from diopt_lightning.instructions.embedder import nearest_tokens


class ConvertingEmbedder(Instruction):
    """A soft instruction that a network makes of a text; its parameters are shared by all tasks.

    Args:
        conversion: The network. Default: mean-pooled embeddings -> linear -> 64 vectors.
    """

    task_names: list[str]

    def __init__(self, conversion: Conversion | None = None) -> None:
        super().__init__()
        self.conversion = conversion if conversion is not None else Linear()

    @property
    def length(self) -> int:
        """Vectors of the longest instruction."""
        return self.conversion.length

    @property
    def has_a_row_for_each_task(self) -> bool:
        """No: the parameters are shared by all tasks."""
        return False


class EmbedderIC(ConvertingEmbedder):
    """Instruction embedder, instance conversion: a small network makes a soft instruction of each instance (x, y).

    (Isonuma et al. 2023.) Its parameters are shared by all tasks, so it also works for tasks that it was not trained
    on, as long as it does not ask for their targets. The instance's tokens are those of its source, with the prompt's
    words around the input.

    Args:
        conversion: The network. Default: mean-pooled embeddings -> linear -> 64 vectors.
        targets: Whether the target ``y`` belongs to the instance. Default: yes, as in the paper; say no to use the
            instruction on unseen tasks, whose targets are not known.

    Example:
        >>> from diopt_lightning.instructions import TokenWise
        >>> EmbedderIC(TokenWise(max_length=32)).length
        32
    """

    def __init__(self, conversion: Conversion | None = None, targets: bool = True) -> None:
        super().__init__(conversion)
        self.targets = targets
        self._examples: list[Batch] = []

    @property
    def works_on_unseen_tasks(self) -> bool:
        """Whether it does without targets."""
        return not self.targets

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Make the network; see :class:`Instruction`."""
        self.task_names = [task.name for task in tasks]
        self.conversion.build(embedding)
        self._examples = [example_batch(index, task, tokenizer) for index, task in enumerate(tasks)]

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task the tokens nearest to its first instance's instruction, and the cosines."""
        vectors = self.representatives(partial(embedded, embedding))
        return nearest_tokens(self.task_names, vectors, tokenizer, embedding, of_instance=True)

    @torch.no_grad()
    def representatives(self, embed: Embed) -> list[Tensor]:
        """Return the instruction of the first instance of each task; see :class:`Instruction`."""
        device = next(self.conversion.parameters()).device
        vectors = []
        for batch in self._examples:
            found = self(Batch(*(column[:1].to(device) for column in batch)), embed)
            vectors.append(found.embeddings[0][found.mask[0]])
        return vectors

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the instruction of each instance."""
        ids, mask = instance_tokens(batch, self.targets)
        return InstructionEmbeddings(*self.conversion(ids, mask, embed))
