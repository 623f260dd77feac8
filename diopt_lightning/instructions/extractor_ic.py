"""The instruction extractor by instance conversion."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch
from diopt_lightning.instructions.base import Embed, InstructionEmbeddings, Tasks, Tokenizer, embedded, outer_dtype
from diopt_lightning.instructions.conversion import Encoding, Pooled, example_batch, instance_tokens, unit_scale
from diopt_lightning.instructions.description import Description
from diopt_lightning.instructions.extractor import Extractor
from diopt_lightning.instructions.relaxation import without_repetition


class ExtractorIC(Extractor):
    r"""Instruction extractor, instance conversion: a bilinear score of encoded candidate and encoded instance.

    .. math:: V_{ij} = e(\text{candidate}_j)^\top B_i \, e(x, y) \, / \, d

    for slot :math:`i`, with encodings of unit mean square and width :math:`d`. (Isonuma et al. 2023.) The forms
    :math:`B` are shared by all tasks, so it also works for tasks that it was not trained on, as long as it does not ask
    for their targets. They start at zero: every candidate is as likely as any other. The choice is phi's alone: token
    embeddings are constants in the score, which a model could otherwise learn to bend.

    Args:
        args: The first options of every :class:`Extractor`, in its order.
        encoding: Makes one vector of a candidate and of an instance. Default: the mean of token embeddings.
        targets: Whether the target ``y`` belongs to the instance. Default: yes, as in the paper; say no to use the
            instruction on unseen tasks, whose targets are not known.
        options: Further options of every :class:`Extractor`.

    Example:
        >>> from diopt_lightning.instructions import ExpectedLoss
        >>> ExtractorIC(slots=1, candidates=4, relaxation=ExpectedLoss()).candidates
        4
    """

    bilinear: nn.Parameter

    def __init__(self, *args: Any, encoding: Encoding | None = None, targets: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.encoding = encoding if encoding is not None else Pooled()
        self.targets = targets
        self._examples: list[Batch] = []

    @property
    def has_a_row_for_each_task(self) -> bool:
        """No: the parameters are shared by all tasks."""
        return False

    @property
    def works_on_unseen_tasks(self) -> bool:
        """Whether it does without targets."""
        return not self.targets

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Tokenize the candidates and make the encoding and ``bilinear`` ``(slots, width, width)``."""
        super().build(tasks, tokenizer, embedding, unseen)
        self.encoding.build(embedding)
        width = self.encoding.width
        self.bilinear = nn.Parameter(
            torch.zeros(self.slots, width, width, dtype=outer_dtype(embedding), device=embedding.weight.device)
        )
        self._examples = [example_batch(index, task, tokenizer) for index, task in enumerate(tasks)]

    def scores(self, batch: Batch, embed: Embed) -> Tensor:
        """The logits of each instance over its candidates, ``(batch, slots, candidates)``."""

        def constants(ids: Tensor) -> Tensor:
            return embed(ids).detach()

        # The candidates of a task are encoded once, however many instances of it there are.
        tasks, position = torch.unique(batch.task, return_inverse=True)
        mask = self.candidate_mask[tasks].flatten(0, 1)
        # A candidate that a task does not have is ruled out later; one position keeps its encoding finite.
        mask = mask | (~mask.any(dim=1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0))
        encoded = self.encoding(self.candidate_ids[tasks].flatten(0, 1), mask, constants)
        candidates = unit_scale(encoded).view(len(tasks), self.candidates, -1)
        instances = unit_scale(self.encoding(*instance_tokens(batch, self.targets), constants))
        turned = torch.einsum("bw,svw->bsv", instances, self.bilinear)
        logits = torch.einsum("bsv,bnv->bsn", turned, candidates[position]) / candidates.shape[-1]
        allowed = self.allowed(batch)
        return logits if allowed is None else logits.masked_fill(~allowed.unsqueeze(1), -torch.inf)

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return the chosen exemplars of each instance."""
        return self.relaxation.extract(self, batch.task, self.scores(batch, embed), embed)

    @torch.no_grad()
    def choices(self, batch: Batch, embed: Embed) -> Tensor:
        """The likeliest candidates for each instance, ``(batch, slots)``."""
        return without_repetition(self.scores(batch, embed), self.repeats).argmax(dim=-1)

    @torch.no_grad()
    def mean_probabilities(self, embed: Embed) -> Tensor:
        """How likely each candidate is on average over the first instances of its task, as in :meth:`described`."""
        means = []
        for batch in self._examples:
            on_device = Batch(*(column.to(self.bilinear.device) for column in batch))
            # Looking must not change what a run draws next, where instances draw their candidates.
            with torch.random.fork_rng(devices=[]):
                scores = self.scores(on_device, embed)
            means.append(self.relaxation.probabilities(scores).mean(dim=0))
        return torch.stack(means)

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return for each task the exemplars that are likeliest on average over its first instances."""
        return self.described(self.mean_probabilities(partial(embedded, embedding)), of_instance=True)

    @torch.no_grad()
    def representatives(self, embed: Embed) -> list[Tensor]:
        """Return the exemplars that :meth:`describe` names; see :class:`Instruction`."""
        return self.likeliest(self.mean_probabilities(embed), embed)
