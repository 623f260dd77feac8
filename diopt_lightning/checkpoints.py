"""How a checkpoint is read where there is no trainer."""

import pickle
from pathlib import Path
from typing import Any

import torch

from diopt_lightning.errors import ConfigurationError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's plain content; tensors are mapped, so that what nobody looks at is not read.

    Raises:
        ConfigurationError: If there is no such file, or it is no checkpoint.
    """
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}: give the checkpoint of a run (`.ckpt`).")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        said = str(error).strip().split("\n")[0].split(". ")[0]  # of PyTorch's advice, what has happened
        raise ConfigurationError(
            f"Cannot read {path} as a checkpoint ({said or type(error).__name__}): give a `.ckpt` file that a run has "
            "saved."
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a checkpoint: give a `.ckpt` file that a run has saved.")
    return content
