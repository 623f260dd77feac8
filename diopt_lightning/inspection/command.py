"""``diopt instructions``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from diopt_lightning.errors import ConfigurationError, users_mistake
from diopt_lightning.inspection.page import page
from diopt_lightning.inspection.picture import picture
from diopt_lightning.inspection.report import Report, as_json, load, select
from diopt_lightning.inspection.terminal import show
from diopt_lightning.resuming.checkpoint_reading import understood


def instructions(
    checkpoint: Path,
    json: Path | None = None,
    html: Path | None = None,
    png: Path | None = None,
    tasks: str | None = None,
) -> None:
    """Show what a run learned about the instruction of each task, and how much they differ.

    Args:
        checkpoint: The checkpoint of a run; neither its data nor its model is needed.
        json: Write everything that is known to this file, or to the standard output for ``-``, instead of a table.
        html: Write a page to this file, instead of a table.
        png: Write a picture to this file, instead of a table.
        tasks: Show these train tasks alone: names or patterns such as ``task1*``, separated by commas.

    Raises:
        ConfigurationError: If the file is not such a checkpoint, no task has the name, or there is nothing to draw.
    """
    data = load(checkpoint)
    if tasks is not None:
        data = select(data, tasks)
    report = Report.of(data)
    if json is not None:
        with understood(checkpoint):
            plain = as_json(data)
        if str(json) == "-":
            sys.stdout.write(plain)
        else:
            write(json, plain)
    if html is not None:
        write(html, page(report))
    if png is not None:
        figure = picture(report)
        if figure is None:
            raise ConfigurationError(
                f"There is nothing to draw in {checkpoint}: its instructions depend on the instance, or the run had no "
                "callback `LearnedInstructions`."
            )
        with writing(png):
            figure.savefig(png, format="png")
    if json is html is png is None:
        show(report, Console())


def write(path: Path, text: str) -> None:
    """Write a text file."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a file is written that was asked for.

    Raises:
        ConfigurationError: If there is no such folder, or the path is itself one, or nothing can be written there.
    """
    if not path.parent.is_dir():
        raise ConfigurationError(f"There is no folder {path.parent} to write {path.name} to: make it first.")
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: give the name of a file.")
    with users_mistake(OSError, what=f"Cannot write {path}", then="give another file."):
        yield
