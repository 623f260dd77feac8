"""Metrics of Super-NaturalInstructions."""

from diopt_lightning.metrics.by_task import ExactMatch, RougeL, TaskMetric, in_other_languages
from diopt_lightning.metrics.text import exact_match, rouge_l

__all__ = ["METRICS", "ExactMatch", "RougeL", "TaskMetric", "exact_match", "in_other_languages", "rouge_l"]

METRICS: dict[str, type[TaskMetric]] = {"rougeL": RougeL, "exact_match": ExactMatch}
"""The metrics of dev and test tasks, by the names under which they are logged."""
