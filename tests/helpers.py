"""Helpers of the tests."""

import inspect
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diopt_lightning.backbones.rows import compact, insert
from diopt_lightning.instructions.base import InstructionEmbeddings


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A trainer on one CPU process that writes and shows nothing unless asked to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))


def prepend(instruction: InstructionEmbeddings, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder of a backbone reads: embeddings with instructions before them, and their mask."""
    embeddings, mask = insert(instruction, embeddings, mask)
    mask, embeddings = compact(mask, embeddings)
    return embeddings, mask


class InDouble(TorchFunctionMode):
    """Lets models that compute some layers in float32 compute them in float64, which a gradient check needs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, with float64 wherever a float64 tensor would be converted to float32."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if x is torch.float32 else x for x in args]
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


def concrete_classes(module: ModuleType, base: type) -> list[type]:
    """The classes that a module exports and that can be made, among those derived from another one."""
    found = [getattr(module, name) for name in module.__all__]
    return [each for each in found if inspect.isclass(each) and issubclass(each, base) and not inspect.isabstract(each)]
