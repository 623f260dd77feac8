"""Folders to write to."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diopt_lightning.errors import ConfigurationError

# Of the 255 bytes that a file's name may have.
LONGEST_NAME = 200
ANY = "surrogatepass"


def file_name(name: str) -> str:
    """A name that somebody else has given, as that of a file: no two alike, and none that leads out of its folder.

    Letters and digits of all scripts, ``_``, ``-`` and inner dots stay; other characters become ``%`` and their bytes.
    What is long is cut, and ends with a digest.

    Example:
        >>> file_name("task001_a-b"), file_name("../x"), file_name("/[b]")
        ('task001_a-b', '%2E.%2Fx', '%2F%5Bb%5D')
    """
    found = "".join(
        c if c.isalnum() or c in "_-" or (c == "." and place) else "".join(f"%{b:02X}" for b in c.encode("utf-8", ANY))
        for place, c in enumerate(name)
    )
    if found and len(found.encode()) <= LONGEST_NAME:
        return found
    return f"{found[: LONGEST_NAME // 8]}%{hashlib.sha256(name.encode('utf-8', ANY)).hexdigest()}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to write to, and remove it again where an error comes in between.

    Raises:
        ConfigurationError: If there is something in it already, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise ConfigurationError(
            f"Cannot make the folder {folder} ({error.strerror}): give another one to export to."
        ) from error
    if taken:
        raise ConfigurationError(
            f"The folder {folder} is not empty, and an export overwrites nothing: give a new one, or empty it."
        )
    try:
        yield folder
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigurationError(
            f"Cannot write to the folder {folder} ({error.strerror or error}): give another one to export to."
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
