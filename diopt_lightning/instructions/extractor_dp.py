"""The instruction extractor in direct parameterization: a discrete instruction, learned for each task."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.tasks import Task
from diopt_lightning.instructions.base import Embed, InstructionEmbeddings
from diopt_lightning.instructions.candidates import CandidatePool
from diopt_lightning.instructions.extractor import Extractor
from diopt_lightning.instructions.relaxation import Relaxation, StraightThrough


class ExtractorDP(Extractor):
    r"""Instruction extractor, direct parameterization: free logits :math:`V_t \in R^{k \times N}` for each train task.

    (Isonuma et al. 2023.) The logits start at zero, as in the reference implementation: every candidate is
    as likely as any other.

    Args:
        slots: :math:`k`, the exemplars to choose for each task. Default: 1.
        candidates: :math:`N`, the candidates of each task. Default: 32, as in the reference implementation.
        candidate_length: Tokens of a candidate; longer ones are cut, and counted. Default: 128, likewise.
        pool: Where candidates come from. Default: positive examples, filled up with instances.
        relaxation: How the choice is differentiated. Default: straight-through, as in the paper. On the experiment of
            ``configs/demo.yaml`` :class:`~diopt_lightning.instructions.ExpectedLoss` finds the better exemplar far more
            often.

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
    ) -> None:
        super().__init__(slots, candidates, candidate_length, pool)
        self.relaxation = relaxation if relaxation is not None else StraightThrough()

    def build(self, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding) -> None:
        """Tokenize the candidates and make ``logits``, of shape ``(tasks, slots, candidates)``."""
        super().build(tasks, tokenizer, embedding)
        self.logits = nn.Parameter(torch.zeros(len(tasks), self.slots, self.candidates, device=embedding.weight.device))

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the chosen exemplars of each instance's task."""
        return self.relaxation.extract(self, batch.task, self.logits[batch.task], embed)

    @torch.no_grad()
    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        """Return each task's likeliest exemplars; see :class:`Instruction`."""
        tasks = torch.arange(len(self.logits), device=self.logits.device)
        embeddings, mask, _ = self.choose(tasks, self.logits.argmax(dim=-1), embed)
        return [rows[used] for rows, used in zip(embeddings, mask, strict=True)]

    def probabilities(self) -> Tensor:
        """The softmax of the logits, ``(tasks, slots, candidates)``."""
        return self.relaxation.probabilities(self.logits.detach())

    def describe(self, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding) -> list[dict[str, Any]]:
        """Return for each task the chosen exemplar of every slot with its probability.

        ``exemplar`` is what the model reads; ``input``, ``output`` and ``explanation`` are the same as the data has it.
        """
        probabilities, choices = self.probabilities().max(dim=-1)
        described = []
        for task, name in enumerate(self.task_names):
            slots = []
            for choice, probability in zip(choices[task].tolist(), probabilities[task].tolist(), strict=True):
                text, example = self.candidate_texts[task][choice].strip(), self.candidate_examples[task][choice]
                slots.append(
                    {"candidate": choice, "probability": round(probability, 4), "exemplar": text, **asdict(example)}
                )
            described.append({"task": name, "slots": slots})
        return described
