"""Text metrics as torchmetrics: over all instances, per category and per task."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from diopt_lightning.data.files import quoted
from diopt_lightning.data.tasks import Task
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.metrics.text import exact_match, in_another_script, rouge_1, rouge_l

# What ROUGE's own tokenizer finds in a text.
SEEN = re.compile("[a-z0-9]", re.IGNORECASE | re.ASCII)


def in_other_languages(task: Task) -> bool:
    """Whether a task is one for the cross-lingual track: by the languages that it names, or by its references."""
    return any(language.lower() != "english" for language in task.languages) or in_another_script(
        [output for instance in task.instances for output in instance.outputs]
    )


class TaskMetric(Metric, ABC):
    """The mean of a score over instances, times 100: over all, per category and per task.

    Args:
        categories: The category of each task.
        cross_lingual: Whether a task is scored as those of the official cross-lingual track, by name; see
            :func:`in_other_languages`. Default: each instance by its references.

    Raises:
        ConfigurationError: If there are no tasks.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, categories: Mapping[str, str], cross_lingual: Mapping[str, bool] | None = None) -> None:
        super().__init__()
        if not categories:
            raise ConfigurationError(f"{type(self).__name__} needs one task at least, got none.")
        self.categories = dict(categories)
        self.cross_lingual = dict(cross_lingual or {})
        self._index = {name: index for index, name in enumerate(categories)}
        self.add_state("total", torch.zeros(len(categories), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(categories), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # A run in half precision converts its module, and sums in bf16 would stand still at 256.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score one prediction against its references, from 0 to 1."""

    def score_in(self, task: str, prediction: str, references: Sequence[str]) -> float:
        """Score one prediction of a task: as :meth:`score`, if a metric does not go by the task's language."""
        return self.score(prediction, references)

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
            self.total[self._index[task]] += self.score_in(task, prediction, alternatives)
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
    """ROUGE-L F-measure, the maximum over references; see :func:`rouge_l`.

    What is in a script that the tokenizer of an English task does not see scores 0, as in the official evaluation,
    and that is said once.

    Args:
        categories: The category of each task.
        cross_lingual: Whether a task is scored as those of the official cross-lingual track, by name. Default: each
            instance by its references.

    Example:
        >>> metric = RougeL({"task1": "Title Generation"})
        >>> metric.update(["the cats sat"], [["the cat sat down"]], ["task1"])
        >>> metric.compute()["all"]
        tensor(85.7143, dtype=torch.float64)
    """

    _said = False

    def score(self, prediction: str, references: Sequence[str], cross_lingual: bool | None = None) -> float:
        """Score one prediction."""
        return rouge_l(prediction, references, cross_lingual)

    def score_in(self, task: str, prediction: str, references: Sequence[str]) -> float:
        """Score one prediction of a task, in the way of its language."""
        cross_lingual = self.cross_lingual.get(task, in_another_script(references))
        if not (cross_lingual or self._said or any(map(SEEN.search, references))) and "".join(references).strip():
            self._said = True
            rank_zero_warn(
                f"{type(self).__name__} of English tasks sees nothing but letters from a to z and digits: predictions "
                f"for references such as {quoted(references[0])} of `{task}` score 0, as in the official evaluation."
            )
        return self.score(prediction, references, cross_lingual)


class Rouge1(RougeL):
    """ROUGE-1 F-measure, the maximum over references; see :func:`rouge_1`, and :class:`RougeL` for its languages.

    Args:
        categories: The category of each task.
        cross_lingual: As of :class:`RougeL`.

    Example:
        >>> metric = Rouge1({"task1": "Title Generation"})
        >>> metric.update(["sat the cats"], [["the cat sat down"]], ["task1"])
        >>> metric.compute()["all"]
        tensor(85.7143, dtype=torch.float64)
    """

    def score(self, prediction: str, references: Sequence[str], cross_lingual: bool | None = None) -> float:
        """Score one prediction."""
        return rouge_1(prediction, references, cross_lingual)


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
