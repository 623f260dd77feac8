"""Tasks of Super-NaturalInstructions and how they are read from the official layout."""

import difflib
import fnmatch
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diopt_lightning.data.files import quoted, read_bytes
from diopt_lightning.errors import ConfigurationError

LANGUAGES = ("Input_language", "Output_language")
# What stands in a document where a field is given twice with different values: which one is meant nobody can tell.
AMBIGUOUS = object()


@dataclass(frozen=True)
class Example:
    """An annotated example of a task.

    Args:
        input: What the task is applied to.
        output: A right answer, or a wrong one in a negative example.
        explanation: Why; empty where the annotators gave none.
    """

    input: str
    output: str
    explanation: str = ""


@dataclass(frozen=True)
class Instance:
    """An instance of a task.

    Args:
        id: The official identifier, e.g. ``task034-0a1b...``.
        input: What the task is applied to.
        outputs: All reference outputs, one at least.
    """

    id: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task: human-written instructions and instances.

    Args:
        name: The name of its file without the suffix, e.g. ``task034_winogrande_question_modification_object``.
        categories: The official categories; the first one counts where a task is grouped.
        definitions: Instructions in prose; prompts use the first one.
        positive_examples: Annotated examples with right answers.
        negative_examples: Annotated examples with wrong answers.
        instances: What the task is trained and tested on.
        digest: SHA-256 of the file, by which caches know that it has changed.
        languages: The languages of its inputs and outputs that it names.
    """

    name: str
    categories: tuple[str, ...]
    definitions: tuple[str, ...]
    positive_examples: tuple[Example, ...]
    negative_examples: tuple[Example, ...]
    instances: tuple[Instance, ...]
    digest: str = ""
    languages: tuple[str, ...] = ()

    @property
    def category(self) -> str:
        """The category by which this task is grouped."""
        return self.categories[0]


def matching_tasks(names: Sequence[str], patterns: str) -> list[str]:
    """Return the names that match a pattern, in their own order.

    Args:
        names: Names of tasks.
        patterns: Names, or patterns such as ``task1*``, separated by commas.

    Raises:
        ConfigurationError: If a pattern matches none of them; the message says which names come near.

    Example:
        >>> matching_tasks(["task001", "task002", "task010"], "task00*, task010")
        ['task001', 'task002', 'task010']
    """
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            near = ", ".join(f"`{name}`" for name in difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ConfigurationError(
                f"`tasks`: there is no `{pattern}` among the {len(names)} train tasks; names that come near are {near}."
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]


def choose_instances(task: Task, number: int, seed: int | None) -> list[int]:
    """Positions of up to ``number`` instances of a task: drawn at random, or the first ones where there is no seed."""
    available = range(len(task.instances))
    if seed is None or len(available) <= number:
        return list(available[:number])
    return sorted(random.Random(f"instances/{seed}/{task.name}").sample(available, number))


def read_tasks(root: Path, names: Sequence[str]) -> dict[str, Task]:
    """Read ``root/tasks/NAME.json`` for every name, in order.

    Raises:
        ConfigurationError: If a file is missing, lies outside ``root`` or is no valid task; see :func:`read_task`.
    """
    return {name: read_task(root / "tasks" / f"{name}.json", root) for name in names}


def read_task(path: Path, root: Path | None = None) -> Task:
    """Read one task file of the official layout.

    Its languages may be missing. Unknown fields are ignored, as the official files have many. An empty string is
    accepted as the output of an instance (there is one in task1564) and as an explanation, and nowhere else. Several
    instances may have one ``id``: each counts.

    Args:
        path: The file.
        root: The folder that the file must lie in, once links are followed. Default: anywhere.

    Raises:
        ConfigurationError: If the file is missing, is not UTF-8 or not JSON, lacks a field, gives one twice with
            different values, or a field is empty, of another type or holds half of a surrogate pair; the message names
            the file, the field and what was found.
    """
    name = path.name.removesuffix(".json")
    try:
        content = read_bytes(path, root)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot read the task file {path}: {error.strerror}. Put it there, or remove `{name[:80]}` from the "
            "split list."
        ) from error
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise ConfigurationError(f"{path} is JSON that cannot be read: {error}.") from error
    reader = _Fields(path, document, "")
    return Task(
        name=name,
        categories=reader.texts("Categories"),
        definitions=reader.texts("Definition"),
        positive_examples=tuple(_example(field) for field in reader.objects("Positive Examples", may_be_empty=True)),
        negative_examples=tuple(_example(field) for field in reader.objects("Negative Examples", may_be_empty=True)),
        instances=tuple(_instance(field) for field in reader.objects("Instances")),
        digest=hashlib.sha256(content).hexdigest(),
        languages=tuple(name for field in LANGUAGES if document.get(field) for name in reader.texts(field)),
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no value is lost where a name is given twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        for name, value in pairs:
            if value != fields[name]:
                fields[name] = AMBIGUOUS
    return fields


class _Fields:
    """Typed access to the fields of one JSON object; every error says which file, where in it, and what was found."""

    def __init__(self, path: Path, value: Any, place: str) -> None:
        self.path, self.place = path, place
        if not isinstance(value, dict):
            raise self.error("expected a JSON object", value)
        self.value: dict[str, Any] = value

    def error(self, problem: str, value: Any, place: str | None = None) -> ConfigurationError:
        where = self.place if place is None else f"{self.place}{place}"
        return ConfigurationError(f"{self.path}{f', field {where}' if where else ''}: {problem}, got {quoted(value)}.")

    def get(self, name: str) -> Any:
        if name not in self.value:
            raise ConfigurationError(
                f"{self.path}{f', field {self.place}' if self.place else ''}: the field `{name}` is missing."
            )
        if self.value[name] is AMBIGUOUS:
            raise ConfigurationError(
                f"{self.path}, field {self.place}[{name!r}]: it is given twice, with different values; remove one."
            )
        return self.value[name]

    def text(self, name: str, may_be_empty: bool = False) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error("expected a string", value, f"[{name!r}]")
        if not may_be_empty and not value.strip():
            raise self.error("expected a string that is not empty", value, f"[{name!r}]")
        return self.whole(value, name)

    def texts(self, name: str, may_be_empty: bool = False) -> tuple[str, ...]:
        """Read a list of strings with one entry at least; ``may_be_empty`` is about the strings."""
        value = self.get(name)
        # Early releases of the official data have a plain string where there is one definition.
        values = [value] if isinstance(value, str) and name in ("Definition", *LANGUAGES) else value
        if not isinstance(values, list) or not values or not all(isinstance(entry, str) for entry in values):
            raise self.error("expected a list of strings that is not empty", value, f"[{name!r}]")
        if not may_be_empty and not all(entry.strip() for entry in values):
            raise self.error("expected strings that are not empty", value, f"[{name!r}]")
        return tuple(self.whole(entry, name) for entry in values)

    def whole(self, text: str, name: str) -> str:
        """Return a text of whole characters: JSON can name half of one, which no tokenizer and no file takes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise self.error(f"character {error.start} is half of a surrogate pair", half, f"[{name!r}]") from error
        return text

    def objects(self, name: str, may_be_empty: bool = False) -> list["_Fields"]:
        value = self.get(name)
        if not isinstance(value, list) or not (value or may_be_empty):
            raise self.error("expected a list" + ("" if may_be_empty else " that is not empty"), value, f"[{name!r}]")
        return [_Fields(self.path, entry, f"{self.place}[{name!r}][{index}]") for index, entry in enumerate(value)]


def _example(fields: _Fields) -> Example:
    explanation = fields.text("explanation", may_be_empty=True) if "explanation" in fields.value else ""
    return Example(fields.text("input"), fields.text("output"), explanation)


def _instance(fields: _Fields) -> Instance:
    return Instance(fields.text("id"), fields.text("input"), fields.texts("output", may_be_empty=True))
