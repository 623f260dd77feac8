"""Data: tasks, prompts, tokens, batches."""

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.data.prompts import PromptFormat
from diopt_lightning.data.splits import TaskSplits
from diopt_lightning.data.synthetic import BlankExemplars, BlankExemplarsDataModule
from diopt_lightning.data.tasks import Example, Instance, Task

__all__ = [
    "Batch",
    "BlankExemplars",
    "BlankExemplarsDataModule",
    "Example",
    "Instance",
    "NaturalInstructionsDataModule",
    "PromptFormat",
    "Task",
    "TaskSplits",
]
