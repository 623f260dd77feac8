"""Metrics of Super-NaturalInstructions."""

from diopt_lightning.metrics.by_task import ExactMatch, RougeL, TaskMetric
from diopt_lightning.metrics.text import exact_match, rouge_l

__all__ = ["ExactMatch", "RougeL", "TaskMetric", "exact_match", "rouge_l"]
