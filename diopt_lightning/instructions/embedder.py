"""The instruction embedder: a continuous instruction."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import require_at_least
from diopt_lightning.instructions.base import Embed, Instruction, InstructionEmbeddings, Tasks, Tokenizer, embedded
from diopt_lightning.instructions.description import Description
from diopt_lightning.instructions.initialization import Initialization, Normal


class EmbedderDP(Instruction):
    r"""Instruction embedder, direct parameterization: a free matrix :math:`W_t \in R^{l \times d}` for each train task.

    (Isonuma et al. 2023.)

    Args:
        length: :math:`l`, the vectors of an instruction. Default: 64, about the length of a definition; the reference
            implementation takes up to 128.
        init: Where the matrices start. Default: normal, as in the reference implementation.

    Raises:
        ConfigurationError: If the length is not positive.

    Example:
        >>> embedder = EmbedderDP(length=16)
        >>> embedder.length
        16
    """

    weight: nn.Parameter
    task_names: list[str]

    def __init__(self, length: int = 64, init: Initialization | None = None) -> None:
        super().__init__()
        require_at_least(1, of="a soft instruction", length=length)
        self._length = length
        self.init = init if init is not None else Normal()

    @property
    def length(self) -> int:
        """Vectors of an instruction."""
        return self._length

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Make ``weight``, of shape ``(tasks, length, dim)``; see :class:`Instruction`."""
        self.task_names = [task.name for task in tasks]
        self.weight = nn.Parameter(self.init(tasks, self.length, tokenizer, embedding))

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task the vocabulary token nearest to each vector by cosine, and the cosines."""
        vectors = self.task_embeddings(partial(embedded, embedding))
        return nearest_tokens(self.task_names, vectors, tokenizer, embedding)

    @property
    def task_parameter(self) -> str | None:
        """``weight``, unless a subclass makes something else of it; see :class:`Instruction`."""
        return "weight" if type(self).task_embeddings is EmbedderDP.task_embeddings else None

    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Return each task's matrix; see :class:`Instruction`."""
        return list(self.weight.detach())

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the matrix of each instance's task, ``(batch, length, dim)``."""
        embeddings = self.weight[self.rows(batch.task, self.task_names)]
        return InstructionEmbeddings(embeddings, torch.ones_like(embeddings[..., 0], dtype=torch.bool))


def nearest_tokens(
    tasks: Sequence[str],
    vectors: Iterable[Tensor],
    tokenizer: Tokenizer,
    embedding: nn.Embedding,
    of_instance: bool = False,
) -> list[Description]:
    """Read soft instructions as the vocabulary tokens nearest to their vectors, with the cosines.

    Args:
        tasks: Names of the tasks.
        vectors: For each task ``(length, dim)``; compared with the whole vocabulary one task at a time, to save memory.
        tokenizer: The backbone's tokenizer.
        embedding: The backbone's input embedding.
        of_instance: Whether the vectors are only those of the task's first instance.
    """
    vocabulary = F.normalize(embedding.weight.detach()[: len(tokenizer)].float(), dim=-1)
    described = []
    for name, rows in zip(tasks, vectors, strict=True):
        cosine, nearest = (F.normalize(rows.float(), dim=-1) @ vocabulary.T).max(dim=-1)
        tokens = list(tokenizer.convert_ids_to_tokens(nearest.tolist()))
        cosines = [round(value, 4) for value in cosine.tolist()]
        described.append(Description(name, of_instance=of_instance, nearest_tokens=tokens, cosine=cosines))
    return described
