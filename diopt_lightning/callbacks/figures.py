"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw_losses(history: Sequence[tuple[int, dict[str, float]]], names: Sequence[str], path: Path) -> None:
    """Draw losses over steps, each as it was and smoothed.

    Args:
        history: Step and the losses logged at it; a loss may be missing at some steps.
        names: Losses to draw.
        path: The picture's file; its suffix gives the format.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = {"inner_loss": "inner loss (train tasks)", "outer_loss": "outer loss (validation tasks)"}
    for color, name in zip(("tab:blue", "tab:orange"), names, strict=True):
        points = [(step, found[name]) for step, found in history if name in found]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=color, label=labels.get(name, name))
    axes.set_xlabel("inner steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start.

    Example:
        >>> smoothed([1.0, 1.0])
        [1.0, 1.0]
    """
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        means.append(total / norm)
    return means
