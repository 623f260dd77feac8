"""Disjoint sets of tasks: train (inner loss), validation (outer loss), dev (selects checkpoints), test (unseen)."""

import math
import os
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diopt_lightning.data.files import quoted, read_bytes
from diopt_lightning.data.tasks import Task, read_tasks
from diopt_lightning.errors import ConfigurationError

# In bytes; of all common file systems.
LONGEST_FILE_NAME = 255


@dataclass(frozen=True)
class TaskSplits:
    """Names of the tasks in each of the four sets, which share no task.

    Args:
        train: Tasks of the inner loss, which have learnable instructions.
        validation: Tasks of the outer loss, with human-written instructions.
        dev: Tasks that select checkpoints. Lightning's validation loop runs on these.
        test: Unseen tasks, which are reported.

    Raises:
        ConfigurationError: If a task is named twice, in one set or in two, or there are no train tasks.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigurationError("There are no train tasks left: lower `validation_tasks` or `dev_tasks`.")
        seen: dict[str, str] = {}
        for split in ("train", "validation", "dev", "test"):
            for name in getattr(self, split):
                if name in seen:
                    raise ConfigurationError(
                        f"The task `{name}` is named in {seen[name]} and again in {split}: the sets must be disjoint, "
                        "remove it from one of the lists."
                    )
                seen[name] = split


def read_split_list(path: Path, root: Path | None = None) -> tuple[str, ...]:
    """Read a list of task names, one a line; blank lines and spaces around a name are ignored.

    Args:
        path: The file.
        root: The folder that the file must lie in, once links are followed. Default: anywhere.

    Raises:
        ConfigurationError: If the file is missing, is not UTF-8, is empty, names a task twice, or holds something that
            is no plain file name.
    """
    try:
        # Editors that begin a text with a byte order mark are common enough.
        text = read_bytes(path, root).decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"Cannot read the split list {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    lines = text.replace("\r", "\n").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigurationError(f"The split list {path} names no task: write one name a line.")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigurationError(f"{path} names the task `{name}` twice: remove one of the lines.")
        problem = _problem_of(name)
        if problem:
            raise ConfigurationError(f"{path} names the task {quoted(name)}: {problem}.")
        seen.add(name)
    return tuple(names)


def _problem_of(name: str) -> str:
    """Why something cannot be the name of a task; empty if it can."""
    if "/" in name or "\\" in name or name in (".", ".."):
        return "a name is that of a file in `tasks/`, no path"
    if not name.isprintable():
        return "a name has no invisible characters"
    if len(f"{name}.json".encode()) > LONGEST_FILE_NAME:
        return f"a name has {LONGEST_FILE_NAME - len('.json')} bytes at most"
    return ""


def read_split_lists(folder: Path, root: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Read the lists of the official layout: ``train`` and ``test``, and ``validation`` and ``dev`` where they exist.

    Args:
        folder: The folder of the lists.
        root: The folder that the lists must lie in, once links are followed. Default: anywhere.

    Raises:
        ConfigurationError: If the folder or one of the two official lists is missing; see :func:`read_split_list`.
    """
    if not os.path.isdir(folder):
        siblings = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        known = f"there are {siblings}"[:300] if siblings else f"{folder.parent} holds no splits"
        raise ConfigurationError(f"There is no split folder {folder}: set `split` to one that exists ({known}).")
    lists = {split: read_split_list(folder / f"{split}_tasks.txt", root) for split in ("train", "test")}
    for split in ("validation", "dev"):
        path = folder / f"{split}_tasks.txt"
        # A link to nothing is a list that cannot be read, and not one to draw in its place.
        if os.path.lexists(path):
            lists[split] = read_split_list(path, root)
    return lists


def read_data(
    root: Path, split: str, wanted: Mapping[str, float], seed: int, whole_categories: bool
) -> tuple[dict[str, Task], TaskSplits]:
    """Read all tasks of a folder in the official layout, by name, and which set each is in; see :func:`drawn_splits`.

    Raises:
        ConfigurationError: If the folder, a list or a task is missing or wrong.
    """
    if not root.is_dir():
        raise ConfigurationError(
            f"There is no folder {root}: set `data.root` to the folder that holds `tasks/` and `splits/`."
        )
    lists = read_split_lists(root / "splits" / split, root)
    # The lists are checked against each other before anything is drawn, and before files are read.
    TaskSplits(lists["train"], lists.get("validation", ()), lists.get("dev", ()), lists["test"])
    tasks = read_tasks(root, [name for names in lists.values() for name in names])
    categories = {name: task.category for name, task in tasks.items()}
    return tasks, drawn_splits(lists, categories, wanted, seed, whole_categories)


def drawn_splits(
    lists: Mapping[str, tuple[str, ...]],
    categories: Mapping[str, str],
    wanted: Mapping[str, float],
    seed: int,
    whole_categories: bool,
) -> TaskSplits:
    """The four sets, from ``lists`` where there are some; the others are drawn from the train tasks that are left.

    See :func:`count_tasks` for the numbers that are ``wanted``, and :func:`draw_tasks` for the draws.

    Raises:
        ConfigurationError: If there are too few.
    """
    names = dict(lists)
    for split in [split for split in wanted if split not in names]:
        left = {name: categories[name] for name in names["train"]}
        count = count_tasks(f"data.{split}_tasks", wanted[split], len(left))
        names[split], names["train"] = draw_tasks(left, count, seed, whole_categories)
    return TaskSplits(names["train"], names["validation"], names["dev"], names["test"])


def count_tasks(argument: str, wanted: float, available: int) -> int:
    """Turn a number (1 or more, an integer) or a fraction (below 1) into a number of tasks.

    A fraction above zero gives one task at least.

    Raises:
        ConfigurationError: If it is negative, no integer above 1, or more than there are.
    """
    if wanted < 0 or (wanted >= 1 and wanted != int(wanted)):
        raise ConfigurationError(f"`{argument}` must be a number of tasks or a fraction below 1, got {wanted}.")
    count = int(wanted) if wanted >= 1 else math.ceil(wanted * available)
    if count >= available:
        raise ConfigurationError(
            f"`{argument}` is {wanted}, which takes {count} of the {available} tasks that are left to draw from: "
            "lower it, so that train tasks remain."
        )
    return count


def draw_tasks(
    categories: Mapping[str, str], count: int, seed: int, whole_categories: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw tasks at random and return ``(drawn, left)``, both in the order given.

    Args:
        categories: Name to category of the tasks to draw from.
        count: The number of tasks to draw.
        seed: Seed of the draw; equal seeds give equal draws.
        whole_categories: If set, whole categories are drawn at random and each is taken in full if it still fits, so
            that no category is on both sides and fewer than ``count`` tasks may be drawn. Otherwise the draw is
            stratified: every category gives its share, rounded by largest remainder.

    Raises:
        ConfigurationError: If whole categories are asked for and none of them fits.
    """
    generator = random.Random(seed)
    by_category: dict[str, list[str]] = defaultdict(list)
    for name in sorted(categories):
        by_category[categories[name]].append(name)
    for members in by_category.values():
        generator.shuffle(members)
    order = sorted(by_category)
    generator.shuffle(order)
    drawn: set[str] = set()
    if whole_categories:
        for category in order:
            if len(drawn) + len(by_category[category]) <= count:
                drawn.update(by_category[category])
        if count and not drawn:
            smallest = min(map(len, by_category.values()))
            raise ConfigurationError(
                f"No whole category fits into {count} task(s): the smallest has {smallest}. Draw more tasks or unset "
                "`whole_categories`."
            )
    else:
        for category, share in _shares(order, {name: len(by_category[name]) for name in order}, count).items():
            drawn.update(by_category[category][:share])
    return (
        tuple(name for name in categories if name in drawn),
        tuple(name for name in categories if name not in drawn),
    )


def _shares(order: Sequence[str], sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Divide ``count`` in proportion to ``sizes`` by largest remainder; ties go to the earlier one in ``order``."""
    total = sum(sizes.values())
    exact = {name: count * sizes[name] / total for name in order}
    shares = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(order, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares
