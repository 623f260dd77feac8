"""Differentiable instruction optimization for PyTorch Lightning."""

from importlib.metadata import version

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.modules import BilevelModule, InstructionOptimization, InstructionTuning

__version__ = version("diopt_lightning")

__all__ = ["BilevelModule", "ConfigurationError", "InstructionOptimization", "InstructionTuning"]
