"""Learned instructions as text, in copies of the task files."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.files import quoted
from diopt_lightning.data.tasks import read_task
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.export.folder import new_folder
from diopt_lightning.inspection.report import as_json
from diopt_lightning.instructions.description import Description

# Where a candidate of each kind stands in a task file.
FIELDS = {"Positive": "Positive Examples", "Negative": "Negative Examples", "Definition": "Definition"}


def export_text(
    root: Path,
    folder: Path,
    learned: Sequence[Description],
    form: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Copy a data set with the learned instructions written into its tasks, for any trainer that reads it.

    What was chosen comes first in its list (``Positive Examples``, ``Negative Examples`` or ``Definition``), in the
    order of the slots; the annotated entries follow, without those that were chosen. An exemplar is written whole, also
    where the model read it cut to ``candidate_length``. The nearest tokens of a soft instruction become the first
    ``Definition``. The field ``diopt_lightning`` of the task says what was done: ``form``, and under ``parts`` the
    probability of each choice and the cosine of each token. ``lossy`` is true where the text is another instruction
    than the model's: nearest tokens, and the choice for a whole task of a form that chooses for each instance.

    All other fields, other tasks and the split lists stay as they are.

    Args:
        root: The data, in the official layout.
        folder: A new folder.
        learned: What :meth:`~diopt_lightning.instructions.Instruction.describe` returned for each task to write.
        form: The name of the instruction's class.
        tokenizer: Puts the nearest tokens of a soft instruction together; not needed for exemplars.

    Raises:
        ConfigurationError: If the instruction cannot be written as text, the folder is not empty, or the data misses a
            task.
    """
    for part in ("tasks", "splits"):
        if not (root / part).is_dir():
            raise ConfigurationError(
                f"There is no folder {root / part}: set `data` to the folder that holds `tasks/` and `splits/`."
            )
        if folder.resolve().is_relative_to((root / part).resolve()):
            raise ConfigurationError(f"The folder {folder} is within {root / part}, which is copied: give another one.")
    written = {}
    for description in learned:
        path = root / "tasks" / f"{description.task}.json"
        if path.parent != root / "tasks" or not path.name.isprintable():
            raise ConfigurationError(
                f"The checkpoint names the task {quoted(description.task)}, which no file can have."
            )
        read_task(path, root)  # says what is wrong with the file
        document = json.loads(path.read_text(encoding="utf-8"))
        written[path.name] = _with_instruction(document, description, form, tokenizer)
    with new_folder(folder):
        for part in ("tasks", "splits"):
            # Without permissions: a copy of read-only data can be written to.
            shutil.copytree(root / part, folder / part, copy_function=shutil.copyfile)
        for name, document in written.items():
            path = folder / "tasks" / name
            path.write_text(as_json(document, indent=4), encoding="utf-8")
            read_task(path, folder)  # what was learned may be no text that a task can have
            if json.loads(path.read_text(encoding="utf-8")) != document:
                raise ConfigurationError(f"{path} is not what was written: export another `format`.")


def _with_instruction(
    document: dict[str, Any], description: Description, form: str, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """A task's document with its learned instruction."""
    first: dict[str, list[Any]] = {field: [] for field in FIELDS.values()}
    parts: list[dict[str, Any]] = []
    lossy = False
    for part in description.walk():
        if part.slots:
            for slot in part.slots:
                example = {"input": slot.input, "output": slot.output, "explanation": slot.explanation}
                first[FIELDS[slot.kind]].append(slot.input if slot.kind == "Definition" else example)
            parts.append({"slots": part.numbers()["slots"]})
            lossy |= part.of_instance
        elif part.nearest_tokens and not part.of_instance:  # one instance's tokens would be a wrong definition
            first["Definition"].append(_reading(part.nearest_tokens, tokenizer))
            parts.append({"cosine": part.cosine})
            lossy = True
    if not parts:
        raise ConfigurationError(
            f"{form} has no text for the task `{description.task}` as a whole: it chose no exemplar for it and has no "
            "soft instruction of it. Export the model instead (`format: model`)."
        )
    made = {"form": form, "lossy": lossy, "parts": parts}
    written = {field: _before(entries, document[field]) for field, entries in first.items() if entries}
    return {**document, **written, "diopt_lightning": made}


def _before(entries: list[Any], annotated: Any) -> list[Any]:
    """Learned entries of a list, and the annotated ones that are not among them behind."""

    def content(entry: Any) -> Any:
        return (entry["input"], entry["output"]) if isinstance(entry, dict) else entry

    # Early releases of the official data have a plain string where there is one definition.
    behind = [annotated] if isinstance(annotated, str) else annotated
    taken, left = [content(entry) for entry in entries], []
    for entry in behind:
        if content(entry) in taken:
            taken.remove(content(entry))  # so that of two alike, one is left
        else:
            left.append(entry)
    return entries + left


def _reading(tokens: list[str], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Tokens as text."""
    if tokenizer is None:
        raise ConfigurationError("The tokens nearest to a soft instruction need their tokenizer: pass `tokenizer`.")
    # A task with an empty definition is not valid, so a reading of spaces alone is spelled out.
    return tokenizer.convert_tokens_to_string(tokens).strip() or " ".join(tokens)
