"""What was learned, as a picture."""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diopt_lightning.inspection.report import MEASURES, Report

LEARNED, HUMAN = "tab:blue", "tab:orange"


def picture(report: Report) -> Figure | None:
    """Draw instructions beside definitions, their diversity over the training, and how choices and weights changed.

    What a form of instruction does not have is left out.

    Returns:
        The figure, or ``None`` where there is nothing to draw.
    """
    draw: list[Callable[[Report, Axes], None]] = []
    if report.points:
        draw.append(draw_points)
    if len(report.diversity) > 1:
        draw += [partial(draw_measure, name=name) for name in MEASURES]
    if any(len(choice.history) > 1 for task in report.tasks for choice in task.choices):
        draw.append(draw_probabilities)
    if any(len(task.weights) > 1 for task in report.tasks):
        draw.append(draw_weights)
    if not draw:
        return None
    rows = 1 if len(draw) <= 3 else 2
    columns = -(-len(draw) // rows)
    width, height = 5 * columns, 4 * rows
    figure = Figure(figsize=(width, height), dpi=120)
    # Fixed, in inches: a layout that is found by drawing takes longer than all the rest of the callback.
    figure.subplots_adjust(0.75 / width, 0.55 / height, 1 - 0.15 / width, 1 - 0.35 / height, 0.22, 0.3)
    for position, one in enumerate(draw):
        one(report, figure.add_subplot(rows, columns, position + 1))
    return figure


def draw_points(report: Report, axes: Axes) -> None:
    """Draw each task's learned instruction and its human definition."""
    for side, name, color, marker in ((1, "human definitions", HUMAN, "x"), (0, "learned instructions", LEARNED, "o")):
        across, up = ([pair[side][axis] for pair in report.points] for axis in (0, 1))
        axes.scatter(across, up, s=18, marker=marker, color=color, alpha=0.8, linewidths=1, label=name)
    axes.set_title("one point a task: mean of its embeddings", fontsize=10)
    axes.set_xlabel(f"first principal component ({report.share[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({report.share[1]:.0%})")
    # One unit is as long across as it is high: distances can be compared.
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8)


def draw_measure(report: Report, axes: Axes, name: str) -> None:
    """Draw a measure of diversity over the steps."""
    steps, learned, human = zip(*report.diversity, strict=True)
    axes.plot(steps, [numbers[name] for numbers in learned], color=LEARNED, label="learned instructions")
    axes.plot(steps, [numbers[name] for numbers in human], color=HUMAN, label="human definitions")
    axes.set_title(f"{MEASURES[name]} over all tasks", fontsize=10)
    # A little below zero, where the line of equal definitions would lie on the axis.
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    axes.set_xlabel("inner steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_probabilities(report: Report, axes: Axes) -> None:
    """Draw the probability of the likeliest exemplar of every slot over the steps, and the median."""
    lines = [choice.history for task in report.tasks for choice in task.choices if len(choice.history) > 1]
    draw_bundle(axes, [[(step, probability) for step, _, probability in line] for line in lines])
    axes.set_title("probability of the likeliest exemplar", fontsize=10)
    axes.set_ylim(0, 1.03)


def draw_weights(report: Report, axes: Axes) -> None:
    """Draw the weight of every task over the steps, and the median."""
    draw_bundle(axes, [task.weights for task in report.tasks if len(task.weights) > 1])
    axes.set_title("weight of each task", fontsize=10)
    axes.set_ylim(bottom=0)


def draw_bundle(axes: Axes, lines: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Draw thin lines over the same steps, and their median."""
    steps = [step for step, _ in lines[0]]
    for line in lines:
        axes.plot(*zip(*line, strict=True), color=LEARNED, alpha=max(0.1, min(0.5, 10 / len(lines))), linewidth=0.8)
    if len(lines) > 2 and all(len(line) == len(steps) for line in lines):
        columns = zip(*[[value for _, value in line] for line in lines], strict=True)
        medians = [sorted(column)[len(lines) // 2] for column in columns]
        axes.plot(steps, medians, color="black", linewidth=1.6, label="median")
        axes.legend(fontsize=8)
    axes.set_xlabel("inner steps")
    axes.grid(alpha=0.3)
