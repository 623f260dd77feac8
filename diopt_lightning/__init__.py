"""Differentiable instruction optimization for PyTorch Lightning."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diopt_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from diopt_lightning.modules import BilevelModule, InstructionOptimization, InstructionTuning

__all__ = ["BilevelModule", "ConfigurationError", "InstructionOptimization", "InstructionTuning"]


def __getattr__(name: str) -> Any:
    """Import the modules when they are first asked for: ``diopt_lightning.bilevel`` needs PyTorch alone."""
    if name == "__version__":
        return version("diopt_lightning")
    if name in __all__:
        return getattr(import_module("diopt_lightning.modules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
