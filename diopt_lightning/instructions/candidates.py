"""Candidate exemplars of a task, among which an extractor chooses."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import pad
from diopt_lightning.data.prompts import example_body, example_header
from diopt_lightning.data.tasks import Example, Task
from diopt_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class CandidatePool:
    """Where candidates come from.

    Args:
        positive_examples: Take the annotated positive examples of the task, first of all.
        instances: Fill up with instances of the task, drawn at random.
        explanations: Give the explanations of annotated examples.
        seed: Seed of the drawn instances.

    Raises:
        ConfigurationError: If no source is left.
    """

    positive_examples: bool = True
    instances: bool = True
    explanations: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.positive_examples or self.instances):
            raise ConfigurationError("A candidate pool needs `positive_examples` or `instances`, and has neither.")

    def examples(self, task: Task, number: int) -> list[Example]:
        """The first ``number`` candidates of a task.

        Raises:
            ConfigurationError: If the task has fewer.
        """
        examples = list(task.positive_examples) if self.positive_examples else []
        if self.instances:
            generator = random.Random(f"candidates/{self.seed}/{task.name}")
            drawn = generator.sample(task.instances, len(task.instances))
            # An instance without an answer teaches nothing as an exemplar.
            examples += [Example(i.input, i.outputs[0]) for i in drawn if i.outputs[0].strip()]
        if len(examples) < number:
            raise ConfigurationError(
                f"The task `{task.name}` has {len(examples)} candidate exemplars and {number} are asked for: lower "
                "`candidates`, or let the pool take `positive_examples` and `instances` both."
            )
        return examples[:number]

    def texts(self, task: Task, number: int) -> list[str]:
        """The bodies of ``number`` candidates of a task, as a prompt shows them after the header; as above."""
        return [example_body(example, self.explanations) for example in self.examples(task, number)]


@dataclass(frozen=True)
class Candidates:
    """Tokenized candidates of all train tasks.

    Args:
        ids: ``(tasks, candidates, length)``, padded at the end.
        mask: True on tokens, of the same shape.
        headers: Tokens of the header of each slot, ``(slots, header_length)``, padded at the end.
        header_mask: True on tokens, of the same shape.
        texts: The bodies, by task and candidate.
        examples: What the bodies show, likewise.
    """

    ids: Tensor
    mask: Tensor
    headers: Tensor
    header_mask: Tensor
    texts: list[list[str]]
    examples: list[list[Example]]


def tokenize_candidates(
    tasks: Sequence[Task], pool: CandidatePool, number: int, slots: int, length: int, tokenizer: PreTrainedTokenizerBase
) -> Candidates:
    """Tokenize ``number`` candidates of every task, cut at the end to ``length`` tokens; cuts are counted and said.

    The header of a slot (`` Positive Example 1 -``) is not part of a candidate, because every slot has its own.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts = [pool.texts(task, number) for task in tasks]
    examples = [pool.examples(task, number) for task in tasks]
    rows = [[encode(text) for text in candidates] for candidates in texts]
    cut = sum(len(ids) > length for candidates in rows for ids in candidates)
    if cut:
        rank_zero_info(f"candidates: {cut:,} of {len(tasks) * number:,} cut to {length} tokens (`candidate_length`)")
    longest = min(length, max(len(ids) for candidates in rows for ids in candidates))
    ids = torch.full((len(tasks), number, longest), tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for t, candidates in enumerate(rows):
        for n, row in enumerate(candidates):
            kept = row[:longest]
            ids[t, n, : len(kept)] = torch.tensor(kept)
            mask[t, n, : len(kept)] = True
    headers = [encode(example_header("Positive", slot + 1)) for slot in range(slots)]
    header_mask = pad([[1] * len(header) for header in headers], 0).bool()
    return Candidates(ids, mask, pad(headers, tokenizer.pad_token_id), header_mask, texts, examples)
