"""Text metrics as torchmetrics: over all instances, per category and per task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.metrics.text import exact_match, rouge_l


class TaskMetric(Metric, ABC):
    """The mean of a score over instances, times 100: over all, per category and per task.

    Args:
        categories: The category of each task.

    Raises:
        ConfigurationError: If there are no tasks.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, categories: Mapping[str, str]) -> None:
        super().__init__()
        if not categories:
            raise ConfigurationError(f"{type(self).__name__} needs one task at least, got none.")
        self.categories = dict(categories)
        self._index = {name: index for index, name in enumerate(categories)}
        self.add_state("total", torch.zeros(len(categories), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(categories), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # A run in half precision converts its module, and sums in bf16 would stand still at 256.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score one prediction against its references, from 0 to 1."""

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]], tasks: Sequence[str]) -> None:
        """Add predictions.

        Args:
            predictions: Predicted texts.
            references: The references of each.
            tasks: The task's name of each.

        Raises:
            ValueError: If the three differ in length, a prediction has no reference, or a task is unknown.
        """
        if not len(predictions) == len(references) == len(tasks):
            raise ValueError(
                f"Expected as many references and tasks as predictions, got {len(predictions)} predictions, "
                f"{len(references)} lists of references and {len(tasks)} tasks."
            )
        for position, (prediction, alternatives, task) in enumerate(zip(predictions, references, tasks, strict=True)):
            if not alternatives:
                raise ValueError(f"Prediction {position} (task `{task}`) has no reference: one at least is needed.")
            if task not in self._index:
                raise ValueError(f"The task `{task}` of prediction {position} is none of this metric's tasks.")
            self.total[self._index[task]] += self.score(prediction, alternatives)
            self.count[self._index[task]] += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the means times 100 as ``all``, ``category/NAME`` and ``task/NAME``, for groups with instances."""
        groups: dict[str, list[int]] = {"all": list(self._index.values())}
        for name, category in sorted(self.categories.items(), key=lambda item: item[1]):
            groups.setdefault(f"category/{category}", []).append(self._index[name])
        for name, index in self._index.items():
            groups[f"task/{name}"] = [index]
        return {
            group: (100 * self.total[indices].sum() / self.count[indices].sum())
            for group, indices in groups.items()
            if self.count[indices].sum() > 0
        }


class RougeL(TaskMetric):
    """ROUGE-L F-measure with Porter stemming, the maximum over references; see :func:`rouge_l`.

    Args:
        categories: The category of each task.

    Example:
        >>> metric = RougeL({"task1": "Title Generation"})
        >>> metric.update(["the cats sat"], [["the cat sat down"]], ["task1"])
        >>> metric.compute()["all"]
        tensor(85.7143, dtype=torch.float64)
    """

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score one prediction."""
        return rouge_l(prediction, references)


class ExactMatch(TaskMetric):
    """Exact match up to case, punctuation and white space, the maximum over references; see :func:`exact_match`.

    Args:
        categories: The category of each task.

    Example:
        >>> metric = ExactMatch({"task1": "Textual Entailment"})
        >>> metric.update(["Yes.", "no"], [["yes"], ["yes", "maybe"]], ["task1", "task1"])
        >>> metric.compute()["task/task1"]
        tensor(50., dtype=torch.float64)
    """

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score one prediction."""
        return exact_match(prediction, references)
