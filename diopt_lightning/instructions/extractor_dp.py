"""The instruction extractor in direct parameterization: a discrete instruction, learned for each task."""

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch
from diopt_lightning.instructions.base import Embed, InstructionEmbeddings, Tasks, Tokenizer, outer_dtype
from diopt_lightning.instructions.description import Description
from diopt_lightning.instructions.extractor import Extractor


class ExtractorDP(Extractor):
    r"""Instruction extractor, direct parameterization: free logits :math:`V_t \in R^{k \times N}` for each train task.

    (Isonuma et al. 2023.) The logits start at zero, as in the reference implementation: every candidate is
    as likely as any other. Its options are those of every :class:`Extractor`.

    Example:
        >>> from diopt_lightning.instructions import Soft
        >>> ExtractorDP(slots=1, candidates=4, relaxation=Soft()).candidates
        4
    """

    logits: nn.Parameter

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Tokenize the candidates and make ``logits``, of shape ``(tasks, slots, candidates)``."""
        super().build(tasks, tokenizer, embedding)
        shape = (len(tasks), self.slots, self.candidates)
        self.logits = nn.Parameter(torch.zeros(shape, dtype=outer_dtype(embedding), device=embedding.weight.device))

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the chosen exemplars of each instance's task."""
        logits, allowed = self.logits[self.rows(batch.task, self.task_names)], self.allowed(batch)
        if allowed is not None:
            logits = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)
        return self.relaxation.extract(self, batch.task, logits, embed)

    @torch.no_grad()
    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Return each task's likeliest exemplars; see :class:`Instruction`."""
        return self.likeliest(self.probabilities(), embed)

    def probabilities(self) -> Tensor:
        """The softmax of the logits, ``(tasks, slots, candidates)``; 0 for candidates that a task does not have."""
        return self.relaxation.probabilities(self.logits.detach().masked_fill(~self.available.unsqueeze(1), -torch.inf))

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task the chosen exemplar of every slot with its probability; see :meth:`described`."""
        return self.described(self.probabilities())
