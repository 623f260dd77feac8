"""Where a soft instruction starts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diopt_lightning.data.long_texts import first_ids
from diopt_lightning.data.prompts import example_body, example_header
from diopt_lightning.data.tasks import Task
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions.base import Tasks, Tokenizer, embedded, outer_dtype


class Initialization(ABC):
    """Makes the initial values of a soft instruction for every train task."""

    @abstractmethod
    def __call__(self, tasks: Tasks, length: int, tokenizer: Tokenizer, embedding: nn.Embedding) -> Tensor:
        """Return ``(tasks, length, dim)``."""


class Normal(Initialization):
    """Independent normal values.

    Args:
        std: Standard deviation. Default: that of the backbone's embeddings, so that a new instruction is as long a
            vector as a word. (The reference implementation draws with a fixed one; embeddings differ between models by
            a factor of hundreds.)

    Raises:
        ConfigurationError: If ``std`` is not positive.
    """

    def __init__(self, std: float | None = None) -> None:
        if std is not None and not std > 0:
            raise ConfigurationError(f"`std` of a normal initialization must be positive, got {std}.")
        self.std = std

    def __call__(self, tasks: Tasks, length: int, tokenizer: Tokenizer, embedding: nn.Embedding) -> Tensor:
        """Draw from the normal distribution."""
        std = self.std if self.std is not None else embedding_scale(embedding)
        drawn = torch.randn(len(tasks), length, embedding.embedding_dim, dtype=outer_dtype(embedding), device="cpu")
        return drawn.to(embedding.weight.device) * std


class Vocabulary(Initialization):
    """The embeddings of tokens drawn from the vocabulary, without special tokens.

    Args:
        first: Draw among so many tokens from the beginning of the vocabulary, where most tokenizers have the commonest.
            Default: all; the reference implementation takes 5,000.

    Raises:
        ConfigurationError: If ``first`` is below 1; when it is used, if there are only special tokens among these.
    """

    def __init__(self, first: int | None = None) -> None:
        require_at_least(1, of="an initialization from the vocabulary", first=first)
        self.first = first

    def __call__(self, tasks: Tasks, length: int, tokenizer: Tokenizer, embedding: nn.Embedding) -> Tensor:
        """Draw tokens uniformly and embed them."""
        special = set(tokenizer.all_special_ids)
        words = torch.tensor([index for index in range(len(tokenizer))[: self.first] if index not in special])
        if not len(words):
            raise ConfigurationError(
                f"The first {self.first} tokens of the vocabulary (`first`) are special ones: raise the number."
            )
        drawn = words[torch.randint(len(words), (len(tasks), length))]
        return embedded(embedding, drawn.to(embedding.weight.device)).detach()


class TextOfTask(Initialization):
    """An embedded text of each task, cut to the length, or repeated where it is shorter."""

    @abstractmethod
    def text(self, task: Task) -> str:
        """The text of a task."""

    def __call__(self, tasks: Tasks, length: int, tokenizer: Tokenizer, embedding: nn.Embedding) -> Tensor:
        """Embed the text of every task.

        Raises:
            ConfigurationError: If a text has no tokens.
        """
        rows = []
        for task in tasks:
            ids = first_ids(tokenizer, self.text(task), length)
            if not ids:
                raise ConfigurationError(f"The text of the task `{task.name}` has no tokens: choose another init.")
            rows.append((ids * -(-length // len(ids)))[:length])
        return embedded(embedding, torch.tensor(rows, device=embedding.weight.device)).detach()


class Definition(TextOfTask):
    """The embedded definition of each task, cut to the length, or repeated where it is shorter."""

    def text(self, task: Task) -> str:
        """The first definition."""
        return task.definitions[0]


class Exemplar(TextOfTask):
    """The embedded first positive examples of each task, cut to the length, or repeated where they are shorter.

    Args:
        number: How many examples at most; a task may have fewer, and one at least. Default: 1.

    Raises:
        ConfigurationError: If the number is below 1; when it is used, if a task has no positive example.
    """

    def __init__(self, number: int = 1) -> None:
        require_at_least(1, of="an initialization by exemplars", number=number)
        self.number = number

    def text(self, task: Task) -> str:
        """The first positive examples, as a prompt shows them."""
        if not task.positive_examples:
            raise ConfigurationError(f"The task `{task.name}` has no positive example: choose another init.")
        examples = task.positive_examples[: self.number]
        return "".join(example_header("Positive", n) + example_body(each) for n, each in enumerate(examples, 1))


class SharedInCategory(Initialization):
    """One initial value for all tasks of a category; they part while they learn.

    Args:
        init: Makes the value, of the first task of the category. Default: normal; with
            :class:`~diopt_lightning.instructions.Vocabulary` the category's tasks share the same words.
    """

    def __init__(self, init: Initialization | None = None) -> None:
        self.init = init if init is not None else Normal()

    def __call__(self, tasks: Tasks, length: int, tokenizer: Tokenizer, embedding: nn.Embedding) -> Tensor:
        """Make one value for each category and give it to its tasks."""
        first = list({task.category: task for task in reversed(tasks)}.values())
        values = dict(
            zip((task.category for task in first), self.init(first, length, tokenizer, embedding), strict=True)
        )
        return torch.stack([values[task.category] for task in tasks])


@torch.no_grad()
def embedding_scale(embedding: nn.Embedding) -> float:
    """Standard deviation of the entries of all token embeddings."""
    vocabulary = torch.arange(len(embedding.weight), device=embedding.weight.device)
    return embedded(embedding, vocabulary).std().item()
