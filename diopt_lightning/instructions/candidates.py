"""Candidate exemplars of a task, among which an extractor chooses."""

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import pad
from diopt_lightning.data.long_texts import first_ids
from diopt_lightning.data.prompts import close, example_body, example_header
from diopt_lightning.data.tasks import Example, Task
from diopt_lightning.data.text_format import encode
from diopt_lightning.errors import ConfigurationError

# What a candidate is, and so which header stands before it: a definition has none.
KINDS = ("Positive", "Negative", "Definition")


@dataclass(frozen=True)
class Candidate:
    """One candidate of a task.

    Args:
        kind: ``Positive``, ``Negative`` or ``Definition``.
        example: What it shows; of a definition, the text is the input.
        instance: Position of the instance that it was taken from in its task's file, or -1 for what was annotated.
    """

    kind: str
    example: Example
    instance: int = -1

    def text(self, explanations: bool) -> str:
        """The text as a prompt shows it, after the header."""
        if self.kind == "Definition":
            return f"Definition: {close(self.example.input)}\n\n"
        return example_body(self.example, explanations and self.instance < 0)


@dataclass(frozen=True)
class CandidatePool:
    """Where candidates come from: any mixture, in this order.

    Args:
        positive_examples: Take the annotated positive examples of the task.
        negative_examples: Take the annotated negative examples, under the header of a negative example.
        definitions: Take all definitions of the task; those after the first are paraphrases where the data has them.
        instances: Fill up with instances of the task, drawn at random. An instance never gets itself as an exemplar,
            nor one with the same input.
        explanations: Give the explanations of annotated examples.
        seed: Seed of the drawn instances.

    Raises:
        ConfigurationError: If no source is left.
    """

    positive_examples: bool = True
    negative_examples: bool = False
    definitions: bool = False
    instances: bool = True
    explanations: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.positive_examples or self.negative_examples or self.definitions or self.instances):
            raise ConfigurationError(
                "A candidate pool needs `positive_examples`, `negative_examples`, `definitions` or `instances`, and "
                "has none of them."
            )

    def candidates(self, task: Task, number: int, unseen: bool = False) -> list[Candidate]:
        """Up to ``number`` candidates of a task.

        Args:
            task: The task.
            number: How many at most.
            unseen: Whether the task is not trained on: its instances have answers that nothing may look at.
        """
        found: list[Candidate] = []
        if self.positive_examples:
            found += [Candidate("Positive", example) for example in task.positive_examples]
        if self.negative_examples:
            found += [Candidate("Negative", example) for example in task.negative_examples]
        if self.definitions:
            found += [Candidate("Definition", Example(definition, "")) for definition in task.definitions]
        if self.instances and not unseen:
            generator = random.Random(f"candidates/{self.seed}/{task.name}")
            drawn = generator.sample(range(len(task.instances)), len(task.instances))
            for position in drawn:
                instance = task.instances[position]
                # An instance without an answer teaches nothing as an exemplar.
                if instance.outputs[0].strip():
                    found.append(Candidate("Positive", Example(instance.input, instance.outputs[0]), position))
        return found[:number]


def shown_instances(task: Task, candidates: Sequence[Candidate]) -> tuple[list[int], list[int]]:
    """Tell which instances a candidate would hand the answer to: those with its input, wherever it was taken from.

    Inputs that differ in case, white space or the form of characters count as one, as they do for many a tokenizer.

    Returns:
        For each instance of the task the position of the first one with its input; for each candidate that of the
        first instance with its input, or -1 where there is none, or where its output is no answer.
    """
    first: dict[str, int] = {}
    of_instances = [first.setdefault(_folded(instance.input), n) for n, instance in enumerate(task.instances)]
    positive = [candidate.kind == "Positive" for candidate in candidates]
    inputs = [_folded(candidate.example.input) for candidate in candidates]
    return of_instances, [first.get(text, -1) if shows else -1 for text, shows in zip(inputs, positive, strict=True)]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Candidates:
    """Tokenized candidates of tasks.

    Args:
        ids: ``(tasks, candidates, length)``, padded at the end.
        mask: True on tokens, of the same shape; nowhere for a candidate that a task does not have.
        headers: Tokens of the header of each kind and slot, ``(kinds, slots, header_length)``, padded at the end.
        header_mask: True on tokens, of the same shape.
        kinds: Which of ``headers`` each candidate has, ``(tasks, candidates)``.
        rows: The candidates, by task.
        texts: What the model reads of them, after the header, likewise.
    """

    ids: Tensor
    mask: Tensor
    headers: Tensor
    header_mask: Tensor
    kinds: Tensor
    rows: list[list[Candidate]]
    texts: list[list[str]]


def tokenize_candidates(
    rows: Sequence[Sequence[Candidate]],
    number: int,
    slots: int,
    length: int,
    explanations: bool,
    cut: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> Candidates:
    """Tokenize candidates, cut at the end to ``length`` tokens; cuts are counted and said.

    The header of a slot (`` Positive Example 1 -``) is not part of a candidate, because every slot has its own.

    Args:
        rows: The candidates of each task.
        number: Candidates of a task at most; tasks with fewer are padded.
        slots: Exemplars that are chosen.
        length: Tokens of a candidate at most.
        explanations: Whether annotated examples are given with their explanations.
        cut: Whether longer ones are cut, instead of refused.
        tokenizer: The backbone's tokenizer.

    Raises:
        ConfigurationError: If a candidate is longer and must not be cut.
    """
    texts = [[candidate.text(explanations) for candidate in candidates] for candidates in rows]
    encoded = [[first_ids(tokenizer, text, length + 1) for text in row] for row in texts]
    pairs = [pair for t, e in zip(texts, encoded, strict=True) for pair in zip(t, e, strict=True)]
    too_long = [text for text, ids in pairs if len(ids) > length]
    if too_long and not cut:
        raise ConfigurationError(
            f"{len(too_long)} candidates are longer than `candidate_length`, {length} tokens; the first of them is "
            f"{too_long[0][:60]!r}. Raise the limit, or let them be cut (`cut_candidates`)."
        )
    if too_long:
        total = sum(map(len, rows))
        rank_zero_info(f"candidates: {len(too_long):,} of {total:,} cut to {length} tokens (`candidate_length`)")
    fewer = [len(row) for row in rows if len(row) < number]
    if fewer:
        rank_zero_info(
            f"candidates: {len(fewer):,} of {len(rows):,} tasks have fewer than {number} (`candidates`), {min(fewer)} "
            "at the least"
        )
    longest = min(length, max(len(ids) for candidates in encoded for ids in candidates))
    ids = torch.full((len(rows), number, longest), tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    kinds = torch.zeros(ids.shape[:2], dtype=torch.long)
    used = [kind for kind in KINDS if any(candidate.kind == kind for row in rows for candidate in row)]
    for t, candidates in enumerate(encoded):
        for n, row in enumerate(candidates):
            tokens = row[:longest]
            ids[t, n, : len(tokens)] = torch.tensor(tokens)
            mask[t, n, : len(tokens)] = True
            kinds[t, n] = used.index(rows[t][n].kind)
    headers = [
        encode(tokenizer, example_header(kind, slot + 1)) if kind != "Definition" else []
        for kind in used
        for slot in range(slots)
    ]
    header_ids = pad(headers, tokenizer.pad_token_id).view(len(used), slots, max(map(len, headers)))
    header_mask = pad([[1] * len(header) for header in headers], 0).view(header_ids.shape).bool()
    return Candidates(ids, mask, header_ids, header_mask, kinds, [list(row) for row in rows], texts)
