"""Prompts in exactly the format of Super-NaturalInstructions' own trainer (Wang et al. 2022), as text."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diopt_lightning.data.tasks import Example, Task
from diopt_lightning.errors import ConfigurationError, require_at_least


@dataclass(frozen=True)
class PromptFormat:
    """Which human-written parts stand before the input.

    The defaults are those that Wang et al. report as the best for English test tasks: the definition and two positive
    examples.

    Args:
        task_name: Begin with the name of the task.
        definition: Give the first definition of the task.
        positive_examples: Up to how many positive examples to give.
        negative_examples: Up to how many negative examples to give.
        explanations: Give the explanations of the examples.
    """

    task_name: bool = False
    definition: bool = True
    positive_examples: int = 2
    negative_examples: int = 0
    explanations: bool = False

    def __post_init__(self) -> None:
        positive, negative = self.positive_examples, self.negative_examples
        require_at_least(0, of="a prompt", positive_examples=positive, negative_examples=negative)


def prompts_of_evaluation(given: PromptFormat | Mapping[str, PromptFormat]) -> dict[str, PromptFormat]:
    """The prompts of dev and test tasks by what is evaluated: ``dev`` and ``test``, or ``test/NAME`` of several.

    Raises:
        ConfigurationError: If there is none, or a name cannot be one of a file.

    Example:
        >>> list(prompts_of_evaluation({"definition": PromptFormat(), "name": PromptFormat(task_name=True)}))
        ['dev', 'test/definition', 'test/name']
    """
    if isinstance(given, PromptFormat):
        return {"dev": given, "test": given}
    wrong = [name for name in given if not re.fullmatch(r"[\w-]+", name)]
    if wrong or not given:
        raise ConfigurationError(
            "`data.test_prompt` is a prompt, or several by names of letters, digits, `_` and `-`, got "
            f"{f'the name {wrong[0]!r}' if wrong else 'none'}."
        )
    return {"dev": next(iter(given.values())), **{f"test/{name}": prompt for name, prompt in given.items()}}


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Args:
        text: The source text.
        dropped_examples: Examples that were asked for, are there, and did not fit.
    """

    text: str
    dropped_examples: int = 0


def close(text: str) -> str:
    """Strip a text and add a full stop, unless it ends in punctuation.

    Example:
        >>> close(" a list of words "), close("Really?")
        ('a list of words.', 'Really?')
    """
    text = text.strip()
    return text if text and text[-1] in string.punctuation else f"{text}."


def example_header(kind: str, number: int) -> str:
    """The line before an example, e.g. `` Positive Example 1 -``; the leading space belongs to the format."""
    return f" {kind} Example {number} -\n"


def example_body(example: Example, explanations: bool = False) -> str:
    r"""An example without its header.

    Example:
        >>> example_body(Example("2 + 2", "4", "We add."), explanations=True)
        'Input: 2 + 2.\n Output: 4.\n Explanation: We add.\n\n'
    """
    # An empty field becomes a lone full stop there, as the last character before it is a space.
    body = f"Input: {close(example.input)}\n Output: {close(example.output)}\n"
    if explanations:
        body += f" Explanation: {close(example.explanation)}\n"
    return f"{body}\n"


def render_input(text: str) -> str:
    r"""The end of every prompt: what to complete.

    Example:
        >>> render_input("2 + 2")
        'Now complete the following example -\nInput: 2 + 2.\nOutput: '
    """
    return f"Now complete the following example -\nInput: {close(text)}\nOutput: "


def render(task: Task, text: str, prompt_format: PromptFormat, fits: Callable[[str], bool]) -> Prompt:
    """Render the prompt of one instance.

    Examples are added while the whole prompt fits. The first that does not fit is dropped with those of its kind that
    follow it, and never cut; as in the official trainer, negative examples are tried even where a positive one was
    dropped.

    Args:
        task: The task, for its instructions.
        text: The input of the instance.
        prompt_format: The parts to give.
        fits: Whether a source text is within the limit.
    """
    head = ""
    if prompt_format.task_name:
        head += f"{task.name}. "
    if prompt_format.definition:
        head += f"Definition: {close(task.definitions[0])}\n\n"
    tail = render_input(text)
    dropped = 0
    groups: list[tuple[str, Sequence[Example]]] = [
        ("Positive", task.positive_examples[: prompt_format.positive_examples]),
        ("Negative", task.negative_examples[: prompt_format.negative_examples]),
    ]
    for kind, examples in groups:
        for number, example in enumerate(examples, start=1):
            rendered = example_header(kind, number) + example_body(example, prompt_format.explanations)
            if not fits(head + rendered + tail):
                dropped += len(examples) - number + 1
                break
            head += rendered
    return Prompt(head + tail, dropped)
