"""Metrics of Super-NaturalInstructions."""

from diopt_lightning.metrics.by_task import ExactMatch, Rouge1, RougeL, TaskMetric, in_other_languages
from diopt_lightning.metrics.text import exact_match, rouge_1, rouge_l

__all__ = [
    "METRICS",
    "ExactMatch",
    "Rouge1",
    "RougeL",
    "TaskMetric",
    "exact_match",
    "in_other_languages",
    "rouge_1",
    "rouge_l",
]

METRICS: dict[str, type[TaskMetric]] = {"rougeL": RougeL, "exact_match": ExactMatch, "rouge1": Rouge1}
"""The metrics of dev and test tasks, by the names under which they are logged."""
