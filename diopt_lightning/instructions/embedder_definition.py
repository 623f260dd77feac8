"""The instruction embedder by instruction conversion."""

from functools import partial

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch, pad
from diopt_lightning.data.long_texts import definition_ids
from diopt_lightning.data.prompts import close
from diopt_lightning.instructions.base import Embed, InstructionEmbeddings, Tasks, Tokenizer, embedded
from diopt_lightning.instructions.description import Description
from diopt_lightning.instructions.embedder import nearest_tokens
from diopt_lightning.instructions.embedder_ic import ConvertingEmbedder


class EmbedderFromDefinition(ConvertingEmbedder):
    """Instruction embedder, instruction to instruction: a network makes a soft instruction of the task's definition.

    As :class:`~diopt_lightning.instructions.EmbedderIC`, with the human-written instruction in the place of the
    instance: the network reads ``Definition: ...``, of the first definition, up to 1024 tokens. Every task has an
    instruction of its own, and so has one that it was not trained on, whose answers nothing looks at.

    Args:
        conversion: The network. Default: mean-pooled embeddings -> linear -> 64 vectors.

    Example:
        >>> from diopt_lightning.instructions import TokenWise, Transformer
        >>> EmbedderFromDefinition(TokenWise(max_length=128, encoder=Transformer())).length
        128
    """

    definition_ids: Tensor
    definition_mask: Tensor

    @property
    def works_on_unseen_tasks(self) -> bool:
        """Yes: they have definitions."""
        return True

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Tokenize the definitions and make the network; see :class:`Instruction`."""
        self.task_names = [task.name for task in tasks]
        texts = [f"Definition: {close(task.definitions[0])}\n\n" for task in [*tasks, *unseen]]
        rows = definition_ids(tokenizer, texts, "definitions that are converted")
        masks = pad([[1] * len(row) for row in rows], 0).bool()
        # Not in the checkpoint: they follow from the data.
        device = embedding.weight.device
        self.register_buffer("definition_ids", pad(rows, tokenizer.pad_token_id).to(device), persistent=False)
        self.register_buffer("definition_mask", masks.to(device), persistent=False)
        self.conversion.build(embedding)

    def converted(self, tasks: Tensor, embed: Embed) -> InstructionEmbeddings:
        """The instructions of tasks ``(rows,)``."""
        mask = self.definition_mask[tasks]
        longest = int(mask.sum(dim=1).max())
        return InstructionEmbeddings(*self.conversion(self.definition_ids[tasks, :longest], mask[:, :longest], embed))

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task the tokens nearest to its instruction, and the cosines."""
        vectors = self.task_embeddings(partial(embedded, embedding))
        return nearest_tokens(self.task_names, vectors, tokenizer, embedding)

    @torch.no_grad()
    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Return what each task's definition is converted to; see :class:`Instruction`."""
        device = self.definition_ids.device
        found = [self.converted(torch.tensor([index], device=device), embed) for index in range(len(self.task_names))]
        return [each.embeddings[0][each.mask[0]] for each in found]

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the instruction of each instance's task."""
        # Each definition is converted once, however many instances of its task there are.
        tasks, position = torch.unique(batch.task, return_inverse=True)
        found = self.converted(tasks, embed)
        return InstructionEmbeddings(found.embeddings[position], found.mask[position])
