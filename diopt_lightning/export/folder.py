"""Folders to write to."""

from pathlib import Path

from diopt_lightning.errors import ConfigurationError


def new_folder(folder: Path) -> Path:
    """Make a folder, and return it.

    Raises:
        ConfigurationError: If there is something in it already, or it cannot be made.
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
    return folder
