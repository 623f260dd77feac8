"""How a checkpoint is checked and read, with a trainer and without one."""

import io
import pickle
import struct
import zipfile
import zlib
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diopt_lightning.errors import OF_A_LIBRARY, ConfigurationError, one_line, users_mistake

# What damaged files make of readers that expect sound ones.
DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, MemoryError)
UNREADABLE = (*DAMAGED, *OF_A_LIBRARY)


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


def understood(path: Path) -> AbstractContextManager[None]:
    """Where what a checkpoint says is put to use: whatever is raised then is about the file, which may be a stranger's.

    Raises:
        ConfigurationError: If it says something else than a run has saved.
    """
    what = f"{path} does not say what a run of this configuration has saved"
    return users_mistake(*OF_A_LIBRARY, what=what, then="give another checkpoint, or the configuration of its run.")


class PlainDescription(pickle.Unpickler):
    """Reads which parts a sharded checkpoint has, and makes nothing but descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """Find what a description is made of."""
        if (module, name) in PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it has {module}.{name}, and may run code")


DESCRIPTIONS = "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
DESCRIPTIONS += "TensorProperties _MEM_FORMAT_ENCODING"
PLAIN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in DESCRIPTIONS.split()),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


def check_parts(folder: Path) -> None:
    """Check that a sharded checkpoint has tensors and plain data alone: PyTorch's own reader runs what code is in it.

    Raises:
        ConfigurationError: If it has more, or is damaged.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            content = PlainDescription(file).load()
        for index, place in content.storage_data.items():
            if type(content.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
                with (folder / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    except UNREADABLE as error:
        raise ConfigurationError(
            f"Cannot read {folder} as a sharded checkpoint ({one_line(error)}): give one that a run has saved."
        ) from error
