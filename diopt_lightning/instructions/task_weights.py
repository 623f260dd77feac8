"""Task weights: how much the loss of each train task counts."""

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch
from diopt_lightning.instructions.base import Embed, Instruction, InstructionEmbeddings, Tasks, Tokenizer, outer_dtype
from diopt_lightning.instructions.description import Description


class TaskWeights(Instruction):
    r"""One weight for each train task, alone or in a :class:`~diopt_lightning.instructions.Composition`.

    The loss of an instance of task :math:`t` counts :math:`T \, \mathrm{softmax}(w)_t`, one on average over the
    :math:`T` tasks. The weights start equal.

    Example:
        >>> TaskWeights().length
        0
    """

    logits: nn.Parameter
    task_names: list[str]

    @property
    def length(self) -> int:
        """No position: there is nothing before the input."""
        return 0

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Make ``logits``, of shape ``(tasks,)``; see :class:`Instruction`."""
        self.task_names = [task.name for task in tasks]
        self.logits = nn.Parameter(
            torch.zeros(len(tasks), dtype=outer_dtype(embedding), device=embedding.weight.device)
        )
        self._width = embedding.embedding_dim

    def weights(self) -> Tensor:
        """The weights ``(tasks,)``, one on average."""
        return len(self.logits) * self.logits.softmax(dim=0)

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return the weight of each task."""
        weights = self.weights().detach().tolist()
        return [
            Description(name, weight=round(weight, 4)) for name, weight in zip(self.task_names, weights, strict=True)
        ]

    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Nothing for each task, ``(0, dim)``; see :class:`Instruction`."""
        return [self.logits.new_zeros(0, self._width)] * len(self.task_names)

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return no vectors, and the weight of each instance's task."""
        # Not embedded tokens: PyTorch has no second derivative of an embedding of none.
        return InstructionEmbeddings(
            self.logits.new_zeros(len(batch.task), 0, self._width),
            torch.ones(len(batch.task), 0, dtype=torch.bool, device=self.logits.device),
            weight=self.weights()[self.rows(batch.task, self.task_names)],
        )
