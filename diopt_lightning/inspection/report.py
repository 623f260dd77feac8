"""What a checkpoint says of learned instructions: plain data, and the same with names and types.

The plain data is what a run writes to ``instructions.json`` and what a checkpoint has under ``instruction``:

- ``form``, ``backbone``, ``encoder_decoder``: the instruction's class, the model's name, and whether it is such a model
- ``tasks``: names of the train tasks
- ``learned``: for each task what :meth:`~diopt_lightning.instructions.Instruction.describe` says of it, as plain data
- ``step``: inner steps that had been taken
- ``history``: for some moments of the training ``step``, ``learned`` (numbers alone) and ``diversity`` (likewise)
- ``diversity``: of ``learned`` instructions and of ``human`` definitions the mean cosine distance and the effective
  rank, and in ``picture`` their coordinates

The last three come from the callback :class:`~diopt_lightning.callbacks.LearnedInstructions`, and may be missing; so
may anything that a form of instruction does not say of a task.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from diopt_lightning.data.tasks import matching_tasks
from diopt_lightning.errors import ConfigurationError, one_line, printable
from diopt_lightning.instructions.description import ChosenExemplar, Description
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint, understood

MEASURES = {"mean_cosine_distance": "mean pairwise cosine distance", "effective_rank": "effective rank"}


@dataclass(frozen=True)
class Choice:
    """The exemplar in a slot of a task's instruction.

    Args:
        candidate: Its number among the candidates.
        probability: Its probability.
        exemplar: Its text.
        history: Step, likeliest candidate at that step, and its probability.
    """

    candidate: int
    probability: float
    exemplar: str
    history: list[tuple[int, int, float]]

    @property
    def changes(self) -> list[tuple[int, int, float]]:
        """The first moment, the moments at which another candidate had become the likeliest, and the last."""
        found = [
            moment
            for index, moment in enumerate(self.history)
            if index in (0, len(self.history) - 1) or moment[1] != self.history[index - 1][1]
        ]
        return found if len(self.history) > 1 else []


@dataclass(frozen=True)
class TaskReport:
    """What was learned for a task.

    Args:
        name: The task.
        choices: Chosen exemplars.
        tokens: The vocabulary token nearest to each soft vector, with the cosine.
        weight: What the task's loss counts, where that is learned; one is the mean.
        weights: Step and weight at that step.
    """

    name: str
    choices: list[Choice]
    tokens: list[tuple[str, float]]
    weight: float | None
    weights: list[tuple[int, float]]


@dataclass(frozen=True)
class Report:
    """What was learned, over all tasks.

    Args:
        form: The instruction's class.
        backbone: The model's name.
        step: Inner steps that had been taken, or ``None`` where the checkpoint does not say.
        tasks: The tasks.
        diversity: Step, numbers of learned instructions and of human definitions at that step.
        points: Coordinates of learned instructions and of human definitions, by task; none where there is no picture.
        share: How much of the variance each of the two coordinates has.
    """

    form: str
    backbone: str
    step: int | None
    tasks: list[TaskReport]
    diversity: list[tuple[int, dict[str, float], dict[str, float]]]
    points: list[tuple[tuple[float, float], tuple[float, float]]]
    share: tuple[float, float]

    def __post_init__(self) -> None:
        if self.points and len(self.points) != len(self.tasks):
            raise ValueError(f"there are {len(self.points)} points for {len(self.tasks)} tasks")

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        """Read plain data."""
        history, form = moments(data), str(data.get("form", "instruction"))
        past = [(moment["step"], descriptions(moment, form)) for moment in history if moment.get("learned")]
        measured = [(moment["step"], moment["diversity"]) for moment in history if moment.get("diversity")]
        plane = (data.get("diversity") or {}).get("picture") or {"learned": [], "human": [], "share": [0.0, 0.0]}
        return cls(
            form=form,
            backbone=str(data.get("backbone", "")),
            step=data.get("step"),
            tasks=[
                task_report(str(name), learned, [(step, then[row]) for step, then in past])
                for row, (name, learned) in enumerate(zip(data["tasks"], descriptions(data, form), strict=True))
            ],
            diversity=[
                (step, *({m: n[of][m] for m in MEASURES} for of in ("learned", "human"))) for step, n in measured
            ],
            points=[
                ((one[0], one[1]), (other[0], other[1]))
                for one, other in zip(plane["learned"], plane["human"], strict=True)
            ],
            share=(plane["share"][0], plane["share"][1]),
        )


def descriptions(data: Mapping[str, Any], form: str) -> list[Description]:
    """What plain data of a form has under ``learned``, as records."""
    return [Description.from_plain_data(row, form) for row in data["learned"]]


def task_report(name: str, learned: Description, past: Sequence[tuple[int, Description]]) -> TaskReport:
    """Put what was learned for a task together with what had been at some steps."""
    past_slots = [(step, slots_of(then)) for step, then in past]
    choices = []
    for position, slot in enumerate(slots_of(learned)):
        there = [(step, slots[position]) for step, slots in past_slots if position < len(slots)]
        history = [(step, then.candidate, then.probability) for step, then in there]
        choices.append(Choice(slot.candidate, slot.probability, slot.exemplar, history))
    weights = [(step, weight_of(then)) for step, then in past]
    return TaskReport(
        name=name,
        choices=choices,
        tokens=[pair for each in learned.walk() for pair in zip(each.nearest_tokens, each.cosine, strict=True)],
        weight=weight_of(learned),
        weights=[(step, weight) for step, weight in weights if weight is not None],
    )


def slots_of(description: Description) -> list[ChosenExemplar]:
    """The slots of all parts that have a choice."""
    return [slot for each in description.walk() for slot in each.slots]


def weight_of(description: Description) -> float | None:
    """The product of the weights of all parts, or ``None`` where none has one."""
    found = [each.weight for each in description.walk() if each.weight is not None]
    return math.prod(found) if found else None


def moments(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The moments of the history and, where it is later than these, the present."""
    history = list(data.get("history", []))
    step = data.get("step")
    if step is not None and (not history or history[-1]["step"] < step):
        history.append({"step": step, "learned": data["learned"], "diversity": data.get("diversity")})
    return history


def load(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says of learned instructions; neither model nor data is needed.

    Raises:
        ConfigurationError: If the file is not there, is no checkpoint, or has no learned instruction.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("instruction"), dict):
        raise ConfigurationError(
            f"{path} has no learned instruction: it is not from a run of `diopt fit` whose model has an `instruction`."
        )
    data: dict[str, Any] = checkpoint["instruction"]
    if "learned" not in data:
        raise ConfigurationError(f"{path} does not say what was learned: it is from another version of this package.")
    data = in_order({"step": checkpoint.get("global_step")} | data)
    with understood(path):
        check_types(Report.of(data), Report)
    return data


def check_types(value: Any, kind: Any) -> None:
    """Check that a value, and all in it, are of the types that are declared.

    Raises:
        TypeError: If one is not.

    Example:
        >>> check_types(Choice(1, 0.5, "text", [(0, 1, None)]), Choice)
        Traceback (most recent call last):
        ...
        TypeError: None where a float belongs
    """
    inner = get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        parts = [(getattr(value, name), hint) for name, hint in hints.items()]
    elif isinstance(kind, UnionType):
        if value is None:
            return
        parts = [(value, inner[0])]
    elif get_origin(kind) is list and isinstance(value, list):
        parts = [(each, inner[0]) for each in value]
    elif get_origin(kind) is dict and isinstance(value, dict):
        parts = [(each, inner[1]) for each in value.values()]
    elif get_origin(kind) is tuple and isinstance(value, tuple):
        parts = list(zip(value, inner, strict=True))
    elif isinstance(value, int | float if kind is float else get_origin(kind) or kind):
        return
    else:
        raise TypeError(f"{one_line(value, 40)} where a {getattr(kind, '__name__', kind)} belongs")
    for part, hint in parts:
        check_types(part, hint)


def in_order(data: dict[str, Any]) -> dict[str, Any]:
    """Sort the entries of plain data: names and numbers first, and long lists after them."""
    names = ("form", "backbone", "encoder_decoder", "step", "tasks", "learned", "diversity")
    first = [name for name in names if name in data]
    return {name: data[name] for name in [*first, *(name for name in data if name not in first)]}


def as_json(data: Any, indent: int | None = 1) -> str:
    r"""Plain data as the JSON of a file, or, without ``indent``, as a line of one.

    Letters of all scripts are written as they are, and what :func:`~diopt_lightning.errors.printable` would spell
    out by JSON's own escapes: the data that are read again are equal.

    Example:
        >>> print(as_json({"é": "\x9b"}, indent=None), end="")
        {"é": "\u009b"}
    """

    def escaped(line: str) -> str:
        return line if line.isprintable() else "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in line)

    lines = json.dumps(data, indent=indent, ensure_ascii=False).split("\n")
    return "\n".join(map(escaped, lines)) + "\n"


def select(data: dict[str, Any], patterns: str) -> dict[str, Any]:
    """Keep the tasks that match; numbers over all tasks stay as they are.

    Args:
        data: What a checkpoint says was learned.
        patterns: As in :func:`~diopt_lightning.data.tasks.matching_tasks`.

    Raises:
        ConfigurationError: If a pattern matches no task.
    """
    names = [str(name) for name in data["tasks"]]
    chosen_names = set(matching_tasks(names, patterns))
    rows = [row for row, name in enumerate(names) if name in chosen_names]

    def some(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows] if values else []

    chosen = data | {"tasks": some(names), "learned": some(data["learned"])}
    if "history" in data:
        chosen["history"] = [moment | {"learned": some(moment.get("learned", []))} for moment in data["history"]]
    if (data.get("diversity") or {}).get("picture"):
        plane = data["diversity"]["picture"]
        drawn = plane | {"learned": some(plane["learned"]), "human": some(plane["human"])}
        chosen["diversity"] = data["diversity"] | {"picture": drawn}
    return chosen
