"""Differentiable instruction optimization for PyTorch Lightning.

The modules are here, their parts in rooms of their own. ``README.md`` in this folder is for those who build on them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diopt_lightning.errors import ConfigurationError, TrainingError

if TYPE_CHECKING:
    from diopt_lightning.modules import BilevelModule, InstructionOptimization, InstructionTuning

__all__ = ["BilevelModule", "ConfigurationError", "InstructionOptimization", "InstructionTuning", "TrainingError"]

ROOMS = ("backbones", "bilevel", "callbacks", "data", "export", "inspection", "instructions", "metrics", "modules")


def __getattr__(name: str) -> Any:
    """Import modules and rooms when they are first asked for: ``diopt_lightning.bilevel`` needs PyTorch alone."""
    if name == "__version__":
        return version("diopt_lightning")
    if name in ROOMS:
        return import_module(f"diopt_lightning.{name}")
    if name in __all__:
        return getattr(import_module("diopt_lightning.modules"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return sorted([*globals(), *__all__, *ROOMS, "__version__"])
