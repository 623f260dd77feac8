"""Callbacks: what is saved, drawn and shown."""

from diopt_lightning.callbacks.exemplars_found import ExemplarsFound
from diopt_lightning.callbacks.instructions import LearnedInstructions
from diopt_lightning.callbacks.memory import MemoryEstimate
from diopt_lightning.callbacks.random_state import RandomState
from diopt_lightning.callbacks.results import Results

__all__ = ["ExemplarsFound", "LearnedInstructions", "MemoryEstimate", "RandomState", "Results"]
