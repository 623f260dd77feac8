"""What was learned, as one HTML page that needs nothing else: no script, no file beside it."""

from collections.abc import Sequence
from html import escape as escape_html

from diopt_lightning.errors import printable
from diopt_lightning.inspection.report import MEASURES, Choice, Report, TaskReport
from diopt_lightning.inspection.terminal import headline

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --faint: #66707b; --back: #fff; --card: #f5f6f8; --line: #d9dde2;
  --learned: #1f6fb2; --human: #c8620a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --faint: #98a2ad; --back: #14171a; --card: #1e2226;
  --line: #353b42; --learned: #69b1ec; --human: #f0a050; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.faint { color: var(--faint); font-size: .87rem; } .learned { color: var(--learned); } .human { color: var(--human); }
table { border-collapse: collapse; } th, td { padding: .25rem .9rem .25rem 0; text-align: right; font-weight: normal; }
th:first-child, td:first-child { text-align: left; } tr + tr { border-top: 1px solid var(--line); }
section { background: var(--card); border-radius: 6px; padding: .8rem 1rem; margin: .7rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: .87rem/1.45 ui-monospace, monospace; }
.choice { display: flex; gap: 1rem; align-items: flex-start; } .choice > div { flex: 1; min-width: 0; }
.token { display: inline-block; padding: 0 .35rem; margin: .1rem; border-radius: 3px;
  font: .85rem ui-monospace, monospace; background: color-mix(in srgb, var(--learned) var(--much), transparent); }
.token small { color: var(--faint); }
svg { display: block; max-width: 100%; height: auto; } svg.plane { background: var(--card); border-radius: 6px; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
"""


def escape(text: str) -> str:
    """A text from tasks or models as a page shows it."""
    return escape_html(printable(text, keep="\n\t"))


def page(report: Report) -> str:
    """Return the page; every text from tasks and models is escaped."""
    sections = "".join(task_section(task) for task in report.tasks)
    backbone = f"<p class='faint'>Backbone: {escape(report.backbone)}</p>" if report.backbone else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Learned instructions</title><style>{STYLE}</style></head><body>\n"
        f"<h1>Learned instructions</h1>\n<p>{escape(headline(report))}</p>\n{backbone}\n"
        f"{diversity(report)}{plane(report)}<h2>By task</h2>\n{sections}</body></html>\n"
    )


def diversity(report: Report) -> str:
    """The diversity as a table."""
    if not report.diversity:
        return "<p class='faint'>No diversity: there are no embeddings of instructions by task.</p>\n"
    (_, first, _), (_, now, human) = report.diversity[0], report.diversity[-1]
    rows = "".join(
        f"<tr><td>{words}</td><td>{first[name]:.3f}</td><td class='learned'>{now[name]:.3f}</td>"
        f"<td>{curve([(step, numbers[name]) for step, numbers, _ in report.diversity], 0.0, None)}</td>"
        f"<td class='human'>{human[name]:.3f}</td></tr>\n"
        for name, words in MEASURES.items()
    )
    return (
        "<h2>Diversity over all train tasks</h2>\n<table><tr><th></th><th>learned, at first</th><th>now</th>"
        f"<th>over the steps</th><th>human definitions</th></tr>\n{rows}</table>\n"
        "<p class='faint'>Each task counts as the mean of its instruction's embeddings. The distance is 0 where all "
        "point the same way and 1 at right angles; the effective rank (Roy and Vetterli 2007) says in how many "
        "directions they spread.</p>\n"
    )


def plane(report: Report) -> str:
    """Instructions beside definitions in two dimensions; a point's name shows under the pointer."""
    if not report.points:
        return ""
    width, height, margin = 640, 400, 16
    points = [point for pair in report.points for point in pair]
    low = [min(point[axis] for point in points) for axis in (0, 1)]
    size = [max(point[axis] for point in points) - low[axis] for axis in (0, 1)]
    room = (width - 2 * margin, height - 2 * margin)
    # One scale for both axes, so that distances can be compared.
    scale = min((room[axis] / size[axis] for axis in (0, 1) if size[axis] > 0), default=0.0)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (margin + (room[axis] - scale * size[axis]) / 2 + scale * (point[axis] - low[axis]) for axis in (0, 1))
        return x, height - y

    marks = []
    for task, (learned, human) in zip(report.tasks, report.points, strict=True):
        (x, y), (u, v), name = place(learned), place(human), escape(task.name)
        marks.append(
            f"<path d='M{u - 4:.1f} {v - 4:.1f}l8 8m0 -8l-8 8' stroke='var(--human)' stroke-width='1.5'>"
            f"<title>{name} (human)</title></path><circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='var(--learned)' "
            f"fill-opacity='.75'><title>{name} (learned)</title></circle>"
        )
    return (
        "<h2>In two dimensions</h2>\n<p class='faint'><span class='learned'>● learned instructions</span> and "
        "<span class='human'>✕ human definitions</span> on the first two principal components of both together "
        f"({report.share[0]:.0%} and {report.share[1]:.0%} of the variance), at one scale.</p>\n"
        f"<svg class='plane' viewBox='0 0 {width} {height}' width='{width}' role='img' "
        f"aria-label='Learned instructions and human definitions'>{''.join(marks)}</svg>\n"
    )


def task_section(task: TaskReport) -> str:
    """What was learned for a task."""
    weight = ""
    if task.weight is not None:
        changed = curve(task.weights, 0.0, None)
        weight = f"<div class='choice'><div>weight <b>{task.weight:.3f}</b> (one is the mean)</div>{changed}</div>"
    choices = "".join(choice_block(choice, position, len(task.choices)) for position, choice in enumerate(task.choices))
    tokens = "".join(
        f"<span class='token' style='--much: {max(0.0, min(1.0, cosine)):.0%}'>{escape(token)} "
        f"<small>{cosine:.2f}</small></span>"
        for token, cosine in task.tokens
    )
    if tokens:
        tokens = f"<div class='faint'>token nearest to each vector, with its cosine</div>{tokens}"
    nothing = "" if weight or choices or tokens else "<span class='faint'>nothing learned for the task alone</span>"
    return f"<section><h3>{escape(task.name)}</h3>{weight}{choices}{tokens}{nothing}</section>\n"


def choice_block(choice: Choice, position: int, slots: int) -> str:
    """A chosen exemplar, its probability, and how both changed."""
    slot = f"slot {position + 1}: " if slots > 1 else ""
    changes = " → ".join(f"step {step:,}: candidate {number} ({chance:.2f})" for step, number, chance in choice.changes)
    told = f"<div class='faint'>the likeliest at {changes}</div>" if changes else ""
    drawn = curve([(step, probability) for step, _, probability in choice.history], 0.0, 1.0)
    return (
        f"<div class='choice'><div>{slot}candidate {choice.candidate}, probability <b>{choice.probability:.3f}</b>"
        f"<pre>{escape(choice.exemplar)}</pre>{told}</div>{drawn}</div>"
    )


def curve(points: Sequence[tuple[int, float]], low: float, high: float | None) -> str:
    """A small curve over the steps, between two values; ``None`` is the largest there is."""
    if len(points) < 2:
        return ""
    width, height = 120, 30
    top = high if high is not None else max(max(value for _, value in points), low + 1e-9)
    first, last = points[0][0], points[-1][0]
    line = " ".join(
        f"{2 + (width - 4) * (step - first) / max(1, last - first):.1f},"
        f"{height - 2 - (height - 4) * (value - low) / (top - low):.1f}"
        for step, value in points
    )
    said = f"{points[0][1]:.3f} at step {first:,}, {points[-1][1]:.3f} at step {last:,}; from {low:g} to {top:.3g}"
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img' aria-label='{said}'>"
        f"<title>{said}</title><path d='M0 {height - 1}H{width}' stroke='var(--line)'/>"
        f"<polyline points='{line}' fill='none' stroke='var(--learned)' stroke-width='1.5'/></svg>"
    )
