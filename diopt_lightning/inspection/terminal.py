"""What was learned, as tables in the terminal."""

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diopt_lightning.errors import printable
from diopt_lightning.inspection.report import MEASURES, Choice, Report, TaskReport

# Of a soft instruction, which may have a hundred vectors, a row shows the first few.
TOKENS = 8


def show(report: Report, console: Console) -> None:
    """Print a table of tasks and one of the diversity over all of them."""
    console.print(Text(headline(report)))
    console.print(tasks_table(report))
    if report.diversity:
        console.print(Text("diversity over all train tasks"))
        console.print(diversity_table(report))
    if not any(task.choices or task.tokens or task.weight is not None for task in report.tasks):
        form = printable(report.form)
        console.print(Text(f"{form} has nothing to show by task: its instructions depend on the instance."))


def headline(report: Report) -> str:
    """What the report is about, in a line."""
    after = f" after {report.step:,} inner steps" if report.step is not None else ""
    return f"{printable(report.form)}, {len(report.tasks):,} train tasks{after}"


def tasks_table(report: Report) -> Table:
    """One row for each task and slot; columns that no task fills are left out."""
    weighted = any(task.weight is not None for task in report.tasks)
    chosen = any(task.choices for task in report.tasks)
    table = Table()
    table.add_column("task", overflow="fold")
    if weighted:
        table.add_column("weight", justify="right", no_wrap=True)
    if chosen:
        table.add_column("candidate", justify="right", no_wrap=True)
        table.add_column("probability", justify="right", no_wrap=True)
    if chosen or any(task.tokens for task in report.tasks):
        table.add_column("exemplar" if chosen else "nearest tokens (cosine)")
    for task in report.tasks:
        rows = [choice_cells(choice) for choice in task.choices] if chosen else []
        if task.tokens:
            rows.append([*(["", ""] if chosen else []), tokens_cell(task, "nearest tokens: " if chosen else "")])
        for position, row in enumerate(rows or [[]]):
            first = [task.name, *([weight_cell(task)] if weighted else [])]
            cells = [*(first if position == 0 else [""] * len(first)), *row]
            # As it is: an exemplar may look like rich's markup, or like what a terminal obeys.
            table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def weight_cell(task: TaskReport) -> str:
    """The weight at first and now."""
    if task.weight is None:
        return ""
    before = f"{task.weights[0][1]:.2f} -> " if len(task.weights) > 1 else ""
    return f"{before}{task.weight:.2f}"


def choice_cells(choice: Choice) -> list[str]:
    """Candidate and probability, each at first and now, and the exemplar in a line."""
    candidate, probability = str(choice.candidate), f"{choice.probability:.2f}"
    if len(choice.history) > 1:
        _, first, probable = choice.history[0]
        candidate = f"{first} -> {candidate}" if first != choice.candidate else candidate
        probability = f"{probable:.2f} -> {probability}"
    return [candidate, probability, shortened(choice.exemplar, 120)]


def tokens_cell(task: TaskReport, before: str) -> str:
    """The first tokens, and how many more there are."""
    shown = before + ", ".join(f"{token} {cosine:.2f}" for token, cosine in task.tokens[:TOKENS])
    more = len(task.tokens) - TOKENS
    return f"{shown} and {more} more" if more > 0 else shown


def diversity_table(report: Report) -> Table:
    """Diversity of learned instructions at first and now, beside that of the human definitions."""
    table = Table()
    for column in ("", "learned, at first", "learned, now", "human definitions"):
        table.add_column(column, justify="right" if column else "left")
    (_, first, _), (_, now, human) = report.diversity[0], report.diversity[-1]
    for name, words in MEASURES.items():
        before = f"{first[name]:.3f}" if len(report.diversity) > 1 else ""
        table.add_row(words, before, f"{now[name]:.3f}", f"{human[name]:.3f}")
    return table


def shortened(text: str, most: int) -> str:
    r"""The text in one line, cut to so many characters.

    Example:
        >>> shortened("Input: a\nOutput: b", 12)
        'Input: a Ou…'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def markdown(report: Report) -> str:
    """The table of tasks for TensorBoard, which reads Markdown and HTML."""
    table = tasks_table(report)
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    rows = [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in zip(*columns, strict=True)]
    lines = [escaped(headline(report)), "", rows[0], "|" + " --- |" * len(columns), *rows[1:]]
    if report.diversity:
        (_, learned, human) = report.diversity[-1]
        lines += ["", *(f"{words}: {learned[k]:.3f} (human: {human[k]:.3f})  " for k, words in MEASURES.items())]
    return "\n".join(lines)


def escaped(text: str) -> str:
    r"""The text with nothing in it that Markdown or HTML would read as its own.

    Example:
        >>> escaped("<b>|*x*")
        '&#60;b&#62;&#124;&#42;x&#42;'
    """
    return re.sub(r"[^\w\s.,:;]|_", lambda found: f"&#{ord(found[0])};", text)
