"""What a model says about dev and test instances, and how good that is."""

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.tasks import Task
from diopt_lightning.metrics import TaskMetric, in_other_languages


class Prediction(TypedDict):
    """A line of the official predictions file, and what it is about.

    The official evaluation reads ``id`` and ``prediction``. Where there are several test prompts, ``prompt`` is the
    name of the one that was read.
    """

    id: str
    prediction: str
    references: list[str]
    task: str
    category: str
    prompt: NotRequired[str]


def predictions_of(texts: Sequence[str], batch: Batch, tasks: Sequence[Task]) -> list[Prediction]:
    """The texts that were generated for the rows of a batch, with what they are about; of rows that count alone."""
    predictions: list[Prediction] = []
    for text, t, i in zip(texts, batch.task.tolist(), batch.instance.tolist(), strict=True):
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
