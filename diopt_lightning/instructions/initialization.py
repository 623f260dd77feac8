"""Where a soft instruction starts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.tasks import Task
from diopt_lightning.errors import ConfigurationError


class Initialization(ABC):
    """Makes the initial values of a soft instruction for every train task."""

    @abstractmethod
    def __call__(
        self, tasks: Sequence[Task], length: int, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding
    ) -> Tensor:
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

    def __call__(
        self, tasks: Sequence[Task], length: int, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding
    ) -> Tensor:
        """Draw from the normal distribution."""
        weight = embedding.weight.detach()
        std = self.std if self.std is not None else weight.float().std().item()
        return torch.randn(len(tasks), length, weight.shape[1]).to(weight) * std


class Vocabulary(Initialization):
    """The embeddings of tokens drawn from the vocabulary, without special tokens."""

    def __call__(
        self, tasks: Sequence[Task], length: int, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding
    ) -> Tensor:
        """Draw tokens uniformly and embed them."""
        special = set(tokenizer.all_special_ids)
        words = torch.tensor([index for index in range(len(tokenizer)) if index not in special])
        drawn = words[torch.randint(len(words), (len(tasks), length))]
        return embedding.weight.detach()[drawn.to(embedding.weight.device)].clone()


class Definition(Initialization):
    """The embedded definition of each task, cut to the length, or repeated where it is shorter."""

    def __call__(
        self, tasks: Sequence[Task], length: int, tokenizer: PreTrainedTokenizerBase, embedding: nn.Embedding
    ) -> Tensor:
        """Embed the first definition of every task."""
        rows = []
        for task in tasks:
            ids = tokenizer(task.definitions[0], add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                raise ConfigurationError(
                    f"The definition of the task `{task.name}` has no tokens: choose another init."
                )
            rows.append((ids * -(-length // len(ids)))[:length])
        return embedding.weight.detach()[torch.tensor(rows, device=embedding.weight.device)].clone()
