"""What a model says about dev and test instances, and how good that is."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.tasks import Task
from diopt_lightning.metrics import TaskMetric, in_other_languages


class Prediction(TypedDict):
    """What was generated for an instance, in how many tokens with the end but no padding, and what it is about.

    Where there are several test prompts, ``prompt`` is the name of the one that was read.
    """

    id: str
    prediction: str
    references: list[str]
    task: str
    category: str
    prompt: NotRequired[str]
    generated_tokens: int


def official_line(prediction: Prediction) -> dict[str, Any]:
    """A prediction under the names of both official evaluations too.

    That of the leaderboard (natural-instructions, ``eval/automatic/evaluation.py``) reads ``id`` and ``prediction``,
    that of Tk-Instruct (``src/compute_metrics.py``) reads ``Task``, ``Prediction`` and the outputs of ``Instance``.
    """
    instance = {"id": prediction["id"], "output": prediction["references"]}
    return {**prediction, "Task": prediction["task"], "Prediction": prediction["prediction"], "Instance": instance}


def official_names(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of :class:`Metrics` by the names of Tk-Instruct's evaluation.

    Example:
        >>> official_names({"rougeL/all": 1.0, "rougeL/category/Data to Text": 2.0, "rougeL/task/task1": 3.0})
        {'rougeL': 1.0, 'rougeL_for_data_to_text': 2.0, 'rougeL_for_task1': 3.0}
    """
    named = {}
    for name, value in scores.items():
        metric, group, *of = name.split("/", maxsplit=2)
        of = ["_".join(of[0].lower().split())] if group == "category" else of
        named["_for_".join([metric, *of])] = value
    return named


def predictions_of(
    outputs: Tensor, tokenizer: PreTrainedTokenizerBase, batch: Batch, tasks: Sequence[Task]
) -> list[Prediction]:
    """What was generated for the rows of a batch, those that count alone, as token ids ``(batch, length)``."""
    predictions: list[Prediction] = []
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    lengths = (outputs != tokenizer.pad_token_id).sum(dim=1)
    columns = (column.tolist() for column in (lengths, batch.task, batch.instance))
    for text, length, t, i in zip(texts, *columns, strict=True):
        if i < 0:
            continue
        task, instance = tasks[t], tasks[t].instances[i]
        predictions.append(
            {
                "id": instance.id,
                "prediction": text.strip(),
                "references": list(instance.outputs),
                "task": task.name,
                "category": task.category,
                "generated_tokens": length,
            }
        )
    return predictions


def of_prompt(evaluation: str, predictions: list[Prediction]) -> list[Prediction]:
    """Predictions with the name of their prompt, where ``test/NAME`` of several is evaluated."""
    prompt = evaluation.partition("/")[2]
    return [{**prediction, "prompt": prompt} for prediction in predictions] if prompt else predictions


class Metrics(MetricCollection):
    """Metrics of predictions by their names, for some tasks."""

    def __init__(self, classes: Mapping[str, type[TaskMetric]], tasks: Sequence[Task]) -> None:
        categories = {task.name: task.category for task in tasks}
        languages = {task.name: in_other_languages(task) for task in tasks}
        metrics: dict[str, Metric | MetricCollection] = {
            name: metric(categories, languages) for name, metric in classes.items()
        }
        super().__init__(metrics, compute_groups=False)

    def update(self, predictions: Sequence[Prediction]) -> None:  # type: ignore[override]
        """Add predictions."""
        super().update(
            [prediction["prediction"] for prediction in predictions],
            [prediction["references"] for prediction in predictions],
            [prediction["task"] for prediction in predictions],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return ``METRIC/all``, ``METRIC/category/NAME`` and ``METRIC/task/NAME``."""
        return {
            f"{name}/{group}": value
            for name, metric in self.items(keep_base=True)
            for group, value in metric.compute().items()
        }
