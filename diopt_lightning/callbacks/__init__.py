"""Callbacks: what is saved, drawn and shown; here are also those of ``resuming`` and ``memory``."""

from lightning.pytorch import Callback

from diopt_lightning.callbacks.exemplars_found import ExemplarsFound
from diopt_lightning.callbacks.instructions import LearnedInstructions
from diopt_lightning.callbacks.noise import UniformNoise
from diopt_lightning.callbacks.results import Results
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
    "UniformNoise",
    "standard_callbacks",
]


def standard_callbacks() -> list[Callback]:
    """Make the callbacks by which a run resumes bitwise, ends with a checkpoint when it is stopped, and leaves results.

    The last one stops it, when the others have kept what they keep. ``Trainer(plugins=[WholeCheckpoints()])``, of
    ``diopt_lightning.resuming``, writes its checkpoints as the command line does.

    Example:
        >>> [type(callback).__name__ for callback in standard_callbacks()][-1]
        'Interruption'
    """
    return [RandomState(), OptimizerOptions(), UnfinishedValidation(), Results(), LearnedInstructions(), Interruption()]
