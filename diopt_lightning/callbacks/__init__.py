"""Callbacks: what is saved, drawn and shown."""

from diopt_lightning.callbacks.exemplars_found import ExemplarsFound
from diopt_lightning.callbacks.instructions import LearnedInstructions
from diopt_lightning.callbacks.results import Results
from diopt_lightning.memory.estimate import MemoryEstimate
from diopt_lightning.resuming.interruption import Interruption
from diopt_lightning.resuming.optimizer_options import OptimizerOptions
from diopt_lightning.resuming.random_state import RandomState
from diopt_lightning.resuming.unfinished_validation import UnfinishedValidation

__all__ = [
    "ExemplarsFound",
    "Interruption",
    "LearnedInstructions",
    "MemoryEstimate",
    "OptimizerOptions",
    "RandomState",
    "Results",
    "UnfinishedValidation",
]
