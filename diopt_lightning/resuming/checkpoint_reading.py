"""How a checkpoint is checked and read, with a trainer and without one."""

import pickle
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diopt_lightning.errors import ConfigurationError

# What damaged files make of readers that expect sound ones. (NotImplementedError is a RuntimeError.)
DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, MemoryError)
UNREADABLE = (*DAMAGED, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def read_checkpoint(path: Path, weights_only: bool = True, **options: Any) -> dict[str, Any]:
    """Read a checkpoint; tensors are mapped, so that what nobody looks at takes no memory.

    Args:
        path: The file.
        weights_only: Whether to refuse everything but tensors and plain data, which alone is safe to read.
        options: Further ones of ``torch.load``.

    Raises:
        ConfigurationError: If there is no such file, or it is no checkpoint, or it is damaged.
    """
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}: give the checkpoint of a run (`.ckpt`).")
    how: dict[str, Any] = {"map_location": "cpu", "mmap": True, "weights_only": weights_only} | options
    try:
        stat = path.stat()
        check_sums(path, stat.st_size, stat.st_mtime_ns)
        content = torch.load(path, **how)
    except UNREADABLE as error:
        said = str(error).strip().split("\n")[0].split(". ")[0]  # of PyTorch's advice, what has happened
        raise ConfigurationError(
            f"Cannot read {path} as a checkpoint ({said or type(error).__name__}): give a `.ckpt` file that a run has "
            "saved."
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a checkpoint: give a `.ckpt` file that a run has saved.")
    return content


@lru_cache(maxsize=8)
def check_sums(path: Path, size: int, modified: int) -> None:
    """Compare all of a file with the checksums in it, once for each state of the file.

    PyTorch writes checksums and does not look at them: a weight with a flipped bit would be loaded as it is. Size and
    time of the last change tell the states of a file apart.

    Raises:
        zipfile.BadZipFile: If they differ, or the file is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"it is damaged: the checksum of its part {damaged} is another")
