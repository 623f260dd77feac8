"""Instructions that are exemplars, chosen among candidates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.tasks import Example, Task
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import Embed, Instruction, InstructionEmbeddings
from diopt_lightning.instructions.candidates import CandidatePool, tokenize_candidates

# Positions set aside for ` Positive Example 1 -`, which is 5 tokens in T5's vocabulary.
HEADER_LENGTH = 8


class Extractor(Instruction):
    r"""Common to all extractors: candidates, and how weights over them become embeddings.

    With weights :math:`p` over the candidates, slot :math:`i` of the instruction is its header (`` Positive Example i
    -``) followed by :math:`\sum_j p_{ij} E(\text{candidate}_j)`, position by position. With one-hot weights that is the
    embedded text of the chosen exemplar, token by token; otherwise a position is used if any candidate reaches it.

    Args:
        slots: :math:`k`, the exemplars to choose.
        candidates: :math:`N`, the candidates of each task.
        candidate_length: Tokens of a candidate; longer ones are cut.
        pool: Where candidates come from.

    Raises:
        ConfigurationError: If a number is not positive, or there are more slots than candidates.
    """

    candidate_ids: Tensor
    candidate_mask: Tensor
    header_ids: Tensor
    header_mask: Tensor

    def __init__(self, slots: int, candidates: int, candidate_length: int, pool: CandidatePool) -> None:
        super().__init__()
        for name, value in {"slots": slots, "candidates": candidates, "candidate_length": candidate_length}.items():
            if value < 1:
                raise ConfigurationError(f"`{name}` of an extractor must be 1 or more, got {value}.")
        if slots > candidates:
            raise ConfigurationError(
                f"An extractor cannot fill {slots} `slots` from {candidates} `candidates`: raise `candidates` or lower "
                "`slots`."
            )
        self.slots = slots
        self.candidates = candidates
        self.candidate_length = candidate_length
        self.pool = pool
        self.task_names: list[str] = []
        self.candidate_texts: list[list[str]] = []
        self.candidate_examples: list[list[Example]] = []

    @property
    def length(self) -> int:
        """Positions of all slots: header and candidate each."""
        return self.slots * (HEADER_LENGTH + self.candidate_length)

    def build(self, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding) -> None:
        """Tokenize the candidates; see :class:`Instruction`."""
        tokenized = tokenize_candidates(tasks, self.pool, self.candidates, self.slots, self.candidate_length, tokenizer)
        if tokenized.headers.shape[1] > HEADER_LENGTH:
            raise ConfigurationError(
                f"The tokenizer makes {tokenized.headers.shape[1]} tokens of the header of an exemplar, and "
                f"{HEADER_LENGTH} are set aside for it: use a tokenizer that knows English words."
            )
        self.task_names = [task.name for task in tasks]
        # Not in the checkpoint: they follow from the data.
        self.register_buffer("candidate_ids", tokenized.ids, persistent=False)
        self.register_buffer("candidate_mask", tokenized.mask, persistent=False)
        self.register_buffer("header_ids", tokenized.headers, persistent=False)
        self.register_buffer("header_mask", tokenized.header_mask, persistent=False)
        self.candidate_texts = tokenized.texts
        self.candidate_examples = tokenized.examples

    def mix(self, task: Tensor, weights: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Mix all candidates of each row's task.

        Args:
            task: Indices of tasks ``(rows,)``.
            weights: Weights over their candidates ``(rows, slots, candidates)``.
            embed: The backbone's input embedding.

        Returns:
            Embeddings ``(rows, slots * (header + candidate), dim)`` and their mask.
        """
        mask = self.candidate_mask[task]
        candidates = embed(self.candidate_ids[task]) * mask.unsqueeze(-1)
        mixed = torch.einsum("rsn,rnld->rsld", weights.to(candidates.dtype), candidates)
        used = torch.einsum("rsn,rnl->rsl", (weights > 0).float(), mask.float()) > 0
        return self.join(mixed, used, embed)

    def choose(self, task: Tensor, choice: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Take one candidate for each slot: as :meth:`mix` with one-hot weights, without embedding the others.

        Args:
            task: Indices of tasks ``(rows,)``.
            choice: Indices of candidates ``(rows, slots)``.
            embed: The backbone's input embedding.
        """
        task = task.unsqueeze(1)
        mask = self.candidate_mask[task, choice]
        return self.join(embed(self.candidate_ids[task, choice]) * mask.unsqueeze(-1), mask, embed)

    def join(self, bodies: Tensor, mask: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Put each slot's header before its exemplar ``(batch, slots, length, dim)`` and the slots in a row."""
        headers = embed(self.header_ids).expand(len(bodies), -1, -1, -1)
        header_mask = self.header_mask.expand(len(bodies), -1, -1)
        return InstructionEmbeddings(
            torch.cat([headers, bodies], dim=2).flatten(1, 2), torch.cat([header_mask, mask], dim=2).flatten(1, 2)
        )


class RandomExemplar(Extractor):
    """Random exemplars of the task, drawn anew for every instance of every batch: nothing is learned.

    The baseline of an extractor, with the same candidates.

    Args:
        slots: The exemplars to draw for each instance, without repetition.
        candidates: The candidates of each task.
        candidate_length: Tokens of a candidate; longer ones are cut, and counted.
        pool: Where candidates come from.

    Raises:
        ConfigurationError: If a number is not positive, or there are more slots than candidates.
    """

    def __init__(
        self, slots: int = 1, candidates: int = 32, candidate_length: int = 128, pool: CandidatePool = CandidatePool()
    ) -> None:
        super().__init__(slots, candidates, candidate_length, pool)

    def describe(self, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding) -> list[dict[str, Any]]:
        """Return the names of the tasks alone, as nothing is learned."""
        return [{"task": name} for name in self.task_names]

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return random exemplars of each instance's task."""
        # Drawn on the CPU: the same exemplars for a seed on every machine.
        drawn = torch.rand(len(batch.task), self.candidates).topk(self.slots).indices.to(batch.task.device)
        return self.choose(batch.task, drawn, embed)
