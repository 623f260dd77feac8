"""Instructions that are exemplars, chosen among candidates."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from diopt_lightning.data.collate import Batch, pad
from diopt_lightning.data.tasks import Task
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions.base import Embed, Instruction, InstructionEmbeddings, Tasks, Tokenizer
from diopt_lightning.instructions.candidates import Candidate, CandidatePool, shown_instances, tokenize_candidates
from diopt_lightning.instructions.description import ChosenExemplar, Description
from diopt_lightning.instructions.relaxation import Relaxation, StraightThrough, without_repetition

# Positions set aside for ` Positive Example 1 -`, which is 5 tokens in T5's vocabulary.
HEADER_LENGTH = 8


class Extractor(Instruction):
    r"""Common to all extractors: candidates, and how weights over them become embeddings.

    With weights :math:`p` over the candidates, slot :math:`i` of the instruction is its header (`` Positive Example i
    -``) followed by :math:`\sum_j p_{ij} E(\text{candidate}_j)`, position by position. With one-hot weights that is the
    embedded text of the chosen exemplar, token by token; otherwise a position is used if any candidate reaches it. An
    instance is never its own exemplar, and gets none with its input either.

    Args:
        slots: :math:`k`, the exemplars to choose. Default: 1.
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
    """

    candidate_ids: Tensor
    candidate_mask: Tensor
    candidate_kinds: Tensor
    candidate_instances: Tensor
    first_instances: Tensor
    available: Tensor
    header_ids: Tensor
    header_mask: Tensor

    def __init__(
        self,
        slots: int = 1,
        candidates: int = 32,
        candidate_length: int = 128,
        pool: CandidatePool = CandidatePool(),
        relaxation: Relaxation | None = None,
        *,
        repeats: bool = False,
        candidates_per_instance: int | None = None,
        cut_candidates: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, of="an extractor", slots=slots, candidates=candidates, candidate_length=candidate_length)
        among = candidates if candidates_per_instance is None else min(candidates, candidates_per_instance)
        if slots > among and not repeats:
            raise ConfigurationError(
                f"An extractor chooses {slots} exemplars (`slots`) among {among} (`candidates`, or "
                "`candidates_per_instance`): it needs at least as many candidates, or `repeats`."
            )
        require_at_least(1, candidates_per_instance=candidates_per_instance)
        self.slots = slots
        self.candidates = candidates
        self.candidate_length = candidate_length
        self.pool = pool
        self.relaxation = relaxation if relaxation is not None else StraightThrough()
        self.repeats = repeats
        self.candidates_per_instance = candidates_per_instance
        self.cut_candidates = cut_candidates
        self.task_names: list[str] = []
        self.candidate_rows: list[list[Candidate]] = []
        self.candidate_texts: list[list[str]] = []

    @property
    def length(self) -> int:
        """Positions of all slots: header and candidate each."""
        return self.slots * (HEADER_LENGTH + self.candidate_length)

    def build(self, tasks: Tasks, tokenizer: Tokenizer, embedding: nn.Embedding, unseen: Tasks = ()) -> None:
        """Tokenize the candidates; see :class:`Instruction`."""
        rows = [self.pool.candidates(task, self.candidates) for task in tasks]
        rows += [self.pool.candidates(task, self.candidates, unseen=True) for task in unseen]
        instances, shown = [], []
        for task, row in zip([*tasks, *unseen], rows, strict=True):
            of_instances, of_candidates = shown_instances(task, row)
            self._check_number(task, of_candidates)
            instances.append([*of_instances, -2])  # which is no candidate's, for rows that are no instance
            shown.append(of_candidates + [-1] * (self.candidates - len(row)))
        tokenized = tokenize_candidates(
            rows,
            self.candidates,
            self.slots,
            self.candidate_length,
            self.pool.explanations,
            self.cut_candidates,
            tokenizer,
        )
        if tokenized.headers.shape[-1] > HEADER_LENGTH:
            raise ConfigurationError(
                f"The tokenizer makes {tokenized.headers.shape[-1]} tokens of the header of an exemplar, and "
                f"{HEADER_LENGTH} are set aside for it: use a tokenizer that knows English words."
            )
        self.task_names = [task.name for task in tasks]
        # Not in the checkpoint: they follow from the data.
        available = tokenized.mask.any(dim=-1)
        for name, tensor in {
            "candidate_ids": tokenized.ids,
            "candidate_mask": tokenized.mask,
            "candidate_kinds": tokenized.kinds,
            "candidate_instances": torch.tensor(shown),
            "first_instances": pad(instances, -2),
            "available": available,
            "header_ids": tokenized.headers,
            "header_mask": tokenized.header_mask,
        }.items():
            self.register_buffer(name, tensor.to(embedding.weight.device), persistent=False)
        self.candidate_rows, self.candidate_texts = tokenized.rows, tokenized.texts
        # Where every instance may choose among all candidates there is nothing to mask.
        self._restricted = (
            not bool(available.all())
            or bool((self.candidate_instances >= 0).any())
            or self.candidates_per_instance is not None
        )

    def _check_number(self, task: Task, shown: Sequence[int]) -> None:
        # Those with the input of an instance are none that it can choose.
        own = max(Counter(position for position in shown if position >= 0).values(), default=0)
        if len(shown) - own < (1 if self.repeats else self.slots):
            raise ConfigurationError(
                f"The task `{task.name}` has {len(shown)} candidate exemplars for {self.slots} `slots`"
                + (f", {'one' if own == 1 else own} of which may be the instance itself" if own else "")
                + ": lower `slots`, or let the `pool` take more kinds of candidates (of a task that is not trained on, "
                "only annotated ones count)."
            )

    def advance(self) -> None:
        """Let the temperature follow its schedule; see :class:`Instruction`."""
        self.relaxation.advance()

    def allowed(self, batch: Batch) -> Tensor | None:
        """Which candidates each instance may choose ``(batch, candidates)``; ``None`` where that is all of them."""
        if not self._restricted:
            return None
        own = self.first_instances[batch.task, batch.instance.clamp(max=self.first_instances.shape[1] - 1)]
        allowed = self.available[batch.task] & (self.candidate_instances[batch.task] != own.unsqueeze(1))
        if self.candidates_per_instance is None:
            return allowed
        # Drawn on the CPU: the same candidates for a seed on every machine.
        order = torch.rand(allowed.shape).to(allowed.device).masked_fill(~allowed, -1.0)
        drawn = order.topk(min(self.candidates_per_instance, self.candidates)).indices
        return torch.zeros_like(allowed).scatter(1, drawn, True) & allowed

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
        weights = weights.to(candidates.dtype)
        mixed = torch.einsum("rsn,rnld->rsld", weights, candidates)
        used = torch.einsum("rsn,rnl->rsl", (weights > 0).float(), mask.float()) > 0
        headers, header_mask = embed(self.header_ids), self.header_mask
        if len(headers) == 1:
            return self.join(
                mixed, used, headers.expand(len(mixed), -1, -1, -1), header_mask.expand(len(mixed), -1, -1)
            )
        kinds = nn.functional.one_hot(self.candidate_kinds[task], len(headers)).to(weights.dtype)
        of_kinds = torch.einsum("rsn,rnk->rsk", weights, kinds)
        # The header that precedes is mixed as what follows it is.
        mixed_headers = torch.einsum("rsk,kshd->rshd", of_kinds, headers * header_mask.unsqueeze(-1))
        used_headers = torch.einsum("rsk,ksh->rsh", (of_kinds > 0).float(), header_mask.float()) > 0
        return self.join(mixed, used, mixed_headers, used_headers)

    def choose(self, task: Tensor, choice: Tensor, embed: Embed) -> InstructionEmbeddings:
        """Take one candidate for each slot: as :meth:`mix` with one-hot weights, without embedding the others.

        Args:
            task: Indices of tasks ``(rows,)``.
            choice: Indices of candidates ``(rows, slots)``.
            embed: The backbone's input embedding.
        """
        task = task.unsqueeze(1)
        mask = self.candidate_mask[task, choice]
        bodies = embed(self.candidate_ids[task, choice]) * mask.unsqueeze(-1)
        kinds, slots = self.candidate_kinds[task, choice], torch.arange(self.slots, device=choice.device)
        return self.join(bodies, mask, embed(self.header_ids[kinds, slots]), self.header_mask[kinds, slots])

    def join(self, bodies: Tensor, mask: Tensor, headers: Tensor, header_mask: Tensor) -> InstructionEmbeddings:
        """Put each slot's header before its exemplar ``(batch, slots, length, dim)`` and the slots in a row."""
        return InstructionEmbeddings(
            torch.cat([headers, bodies], dim=2).flatten(1, 2), torch.cat([header_mask, mask], dim=2).flatten(1, 2)
        )

    def likeliest(self, probabilities: Tensor, embed: Embed) -> list[Tensor]:
        """The embedded exemplars that are likeliest, for ``probabilities`` of ``(tasks, slots, candidates)``."""
        choice = without_repetition(probabilities, self.repeats).argmax(dim=-1)
        chosen = self.choose(torch.arange(len(choice), device=choice.device), choice, embed)
        return [rows[used] for rows, used in zip(chosen.embeddings, chosen.mask, strict=True)]

    def described(self, probabilities: Tensor, of_instance: bool = False) -> list[Description]:
        """Say which exemplars are likeliest, for ``probabilities`` of ``(tasks, slots, candidates)``."""
        choices = without_repetition(probabilities, self.repeats).argmax(dim=-1)
        described = []
        for task, name in enumerate(self.task_names):
            slots = []
            for slot, choice in enumerate(choices[task].tolist()):
                candidate = self.candidate_rows[task][choice]
                probability = round(probabilities[task, slot, choice].item(), 4)
                text = self.candidate_texts[task][choice].strip()
                slots.append(ChosenExemplar(choice, probability, text, candidate.kind, **asdict(candidate.example)))
            described.append(Description(name, of_instance=of_instance, slots=slots))
        return described


class RandomExemplar(Extractor):
    """Random exemplars of the task, drawn anew for every instance of every batch: nothing is learned.

    The baseline of an extractor, with the same candidates.

    Args:
        args: ``slots``, ``candidates``, ``candidate_length`` and ``pool``, as of every extractor.
        options: The same by name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        # What is given here is no option of this class, on the command line neither.
        super().__init__(  # type: ignore[misc]
            *args, **options, relaxation=None, repeats=False, candidates_per_instance=None, cut_candidates=True
        )
        del self.relaxation  # a draw is not differentiated

    def advance(self) -> None:
        """There is no schedule."""

    @property
    def has_a_row_for_each_task(self) -> bool:
        """No: there are no parameters."""
        return False

    @property
    def works_on_unseen_tasks(self) -> bool:
        """There is nothing that it would have to know of a task."""
        return True

    def describe(self, tokenizer: Tokenizer, embedding: nn.Embedding) -> list[Description]:
        """Return the names of the tasks alone, as nothing is learned."""
        return [Description(name) for name in self.task_names]

    def ranks(self, batch: Batch) -> Tensor:
        """Numbers ``(batch, candidates)``, from 0 to 1, by which each instance takes the largest."""
        # Drawn on the CPU: the same exemplars for a seed on every machine.
        return torch.rand(len(batch.task), self.candidates).to(batch.task.device)

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        """Return random exemplars of each instance's task."""
        allowed, ranks = self.allowed(batch), self.ranks(batch)
        drawn = (ranks if allowed is None else ranks.masked_fill(~allowed, -1.0)).topk(self.slots).indices
        return self.choose(batch.task, drawn, embed)
