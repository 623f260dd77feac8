"""What an instruction says was learned for a task: a record, and the plain data that checkpoints have of it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class ChosenExemplar:
    """The likeliest exemplar in a slot.

    Args:
        candidate: Its number among the task's candidates.
        probability: Its probability.
        exemplar: What the model reads.
        kind: What it is taken for: ``Positive``, ``Negative`` or ``Definition``.
        input: The same as the data has it; of a definition, its text.
        output: Likewise.
        explanation: Likewise.
    """

    candidate: int
    probability: float
    exemplar: str = ""
    kind: str = "Positive"
    input: str = ""
    output: str = ""
    explanation: str = ""


@dataclass(frozen=True)
class Description:
    """What was learned for a task; what a form of instruction does not have stays at its default.

    Args:
        task: The task's name; empty for a part of a composition.
        form: The class of a part of a composition; empty for an instruction of its own.
        of_instance: Whether instructions are those of instances, and this only stands for them: the first one's soft
            instruction, or what is chosen most often.
        slots: The exemplar in each slot.
        nearest_tokens: The vocabulary token nearest to each soft vector.
        cosine: The cosine of each.
        weight: What the task's loss counts; one is the mean.
        parts: What each part of a composition says.

    Example:
        >>> Description("task001", weight=1.5).as_plain_data()
        {'task': 'task001', 'weight': 1.5}
    """

    task: str = ""
    form: str = ""
    of_instance: bool = False
    slots: list[ChosenExemplar] = field(default_factory=list)
    nearest_tokens: list[str] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    weight: float | None = None
    parts: list[Self] = field(default_factory=list)

    def walk(self) -> Iterator[Self]:
        """The description itself, and those of all parts of compositions, in order."""
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def is_soft(self) -> bool:
        """Whether there is a soft instruction, alone or beside others."""
        return any(each.nearest_tokens for each in self.walk())

    def numbers(self) -> dict[str, Any]:
        """Plain data of what changes while it is learned: choices with their probabilities, and weights.

        Example:
            >>> Description("task001", slots=[ChosenExemplar(1, 0.5, "...")], cosine=[0.1]).numbers()
            {'slots': [{'candidate': 1, 'probability': 0.5}]}
        """
        parts = [part.numbers() for part in self.parts]
        found = {
            "weight": self.weight,
            "slots": [{"candidate": slot.candidate, "probability": slot.probability} for slot in self.slots],
            "parts": parts if any(parts) else [],
        }
        return {name: value for name, value in found.items() if value not in (None, [])}

    def as_plain_data(self) -> dict[str, Any]:
        """Text and numbers alone, without what is at its default."""
        plain = asdict(self) | {"parts": [part.as_plain_data() for part in self.parts]}
        return {name: value for name, value in plain.items() if value != getattr(NOTHING, name)}

    @classmethod
    def from_plain_data(cls, data: Mapping[str, Any], form: str = "") -> Self:
        """Read what :meth:`as_plain_data` or :meth:`numbers` returned; what is missing or unknown is left out.

        Args:
            data: What a checkpoint says of a task.
            form: The instruction's class, where ``data`` has none.
        """
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        own = str(data.get("form", form))
        slots = [slot for slot in data.get("slots", []) if "candidate" in slot and "probability" in slot]
        names = [each.name for each in fields(ChosenExemplar)]
        return cls(
            **known
            | {
                "of_instance": data.get("of_instance", own in FORMS_OF_INSTANCES),
                "slots": [ChosenExemplar(**{name: slot[name] for name in names if name in slot}) for slot in slots],
                "parts": [cls.from_plain_data(part, own) for part in data.get("parts", [])],
            }
        )


NOTHING = Description()
# Forms that make an instruction of each instance, in checkpoints that do not say so yet.
FORMS_OF_INSTANCES = ("EmbedderIC", "ExtractorIC")
