"""The instruction extractor in direct parameterization: a discrete instruction, learned for each task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.tasks import Task
from diopt_lightning.instructions.base import Embed, InstructionEmbeddings, outer_dtype
from diopt_lightning.instructions.candidates import CandidatePool
from diopt_lightning.instructions.extractor import Extractor, without_repetition
from diopt_lightning.instructions.relaxation import Relaxation, StraightThrough


class ExtractorDP(Extractor):
    r"""Instruction extractor, direct parameterization: free logits :math:`V_t \in R^{k \times N}` for each train task.

    (Isonuma et al. 2023.) The logits start at zero, as in the reference implementation: every candidate is
    as likely as any other.

    Args:
        slots: :math:`k`, the exemplars to choose for each task. Default: 1.
        candidates: :math:`N`, the candidates of each task at most. Default: 32, as in the reference implementation.
        candidate_length: Tokens of a candidate. Default: 128, likewise.
        pool: Where candidates come from. Default: positive examples, filled up with instances.
        relaxation: How the choice is differentiated. Default: straight-through, as in the paper. On the experiment of
            ``configs/demo.yaml`` :class:`~diopt_lightning.instructions.ExpectedLoss` finds the better exemplar far more
            often.
        repeats: Whether slots may choose the same candidate. Default: no.
        candidates_per_instance: Candidates that each instance chooses among, drawn anew for every instance of every
            batch. Default: all.
        cut_candidates: Whether longer candidates are cut, and counted, instead of refused. Default: yes.

    Raises:
        ConfigurationError: If a number is not positive, or there are more slots than candidates.

    Example:
        >>> from diopt_lightning.instructions import Soft
        >>> ExtractorDP(slots=1, candidates=4, relaxation=Soft()).candidates
        4
    """

    logits: nn.Parameter

    def __init__(
        self,
        slots: int = 1,
        candidates: int = 32,
        candidate_length: int = 128,
        pool: CandidatePool = CandidatePool(),
        relaxation: Relaxation | None = None,
        repeats: bool = False,
        candidates_per_instance: int | None = None,
        cut_candidates: bool = True,
    ) -> None:
        super().__init__(slots, candidates, candidate_length, pool, repeats, candidates_per_instance, cut_candidates)
        self.relaxation = relaxation if relaxation is not None else StraightThrough()

    def build(
        self,
        tasks: Sequence[Task],
        tokenizer: PreTrainedTokenizerBase,
        embedding: nn.Embedding,
        unseen: Sequence[Task] = (),
    ) -> None:
        """Tokenize the candidates and make ``logits``, of shape ``(tasks, slots, candidates)``."""
        super().build(tasks, tokenizer, embedding)
        shape = (len(tasks), self.slots, self.candidates)
        self.logits = nn.Parameter(torch.zeros(shape, dtype=outer_dtype(embedding), device=embedding.weight.device))

    def advance(self) -> None:
        """Let the temperature follow its schedule; see :class:`Instruction`."""
        self.relaxation.advance()

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the chosen exemplars of each instance's task."""
        logits, allowed = self.logits[self.rows(batch.task, self.task_names)], self.allowed(batch)
        if allowed is not None:
            logits = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)
        return self.relaxation.extract(self, batch.task, logits, embed)

    @torch.no_grad()
    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Return each task's likeliest exemplars; see :class:`Instruction`."""
        tasks = torch.arange(len(self.logits), device=self.logits.device)
        choice = without_repetition(self.probabilities(), self.repeats).argmax(dim=-1)
        chosen = self.choose(tasks, choice, embed)
        return [rows[used] for rows, used in zip(chosen.embeddings, chosen.mask, strict=True)]

    def probabilities(self) -> Tensor:
        """The softmax of the logits, ``(tasks, slots, candidates)``; 0 for candidates that a task does not have."""
        return self.relaxation.probabilities(self.logits.detach().masked_fill(~self.available.unsqueeze(1), -torch.inf))

    def describe(self, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding) -> list[dict[str, Any]]:
        """Return for each task the chosen exemplar of every slot with its probability; see :meth:`described`."""
        return self.described(self.probabilities())
