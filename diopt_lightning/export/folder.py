"""Folders to write to."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diopt_lightning.errors import ConfigurationError


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
