"""Callbacks: what is saved, drawn and shown; here are also those of ``resuming`` and ``memory``."""

from diopt_lightning.callbacks.exemplars_found import ExemplarsFound
from diopt_lightning.callbacks.instructions import LearnedInstructions
from diopt_lightning.callbacks.results import Results
from diopt_lightning.callbacks.standard import standard_callbacks
from diopt_lightning.memory.estimate import MemoryEstimate
from diopt_lightning.resuming import Interruption, OptimizerOptions, RandomState, UnfinishedValidation

__all__ = [
    "ExemplarsFound",
    "Interruption",
    "LearnedInstructions",
    "MemoryEstimate",
    "OptimizerOptions",
    "RandomState",
    "Results",
    "UnfinishedValidation",
    "standard_callbacks",
]
