"""Which checkpoint a run goes on from."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from diopt_lightning.data.files import quoted, refuse_address
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.resuming.checkpoint_reading import UNREADABLE, check_parts, read_checkpoint, understood
from diopt_lightning.resuming.messages import say

SHARDED = "meta.pt"
COUNTERS = {"epoch", "global_step", "ready", "started", "processed", "completed", "_batches_that_stepped"}
COUNTERS |= {"inner_batches_seen", "inner_steps_taken", "outer_steps_taken"}


def find_checkpoint(given: str | Path | None, root: Path, training: bool) -> str | None:
    """The checkpoint to go on from, where ``last`` stands for the newest one below a folder, and ``best`` for its best.

    Args:
        given: The value of ``ckpt_path``.
        root: The folder.
        training: Whether training is to go on, for which weights alone do not suffice.

    Returns:
        The path, or ``None`` for none: a job that is started again with the same command line may have been stopped
        before its first checkpoint.

    Raises:
        ConfigurationError: If it is of no use, or there is none where one is needed.
    """
    if given == "last":
        path = newest_checkpoint(root, training)
        if path is None and not training:
            raise ConfigurationError(f"There is no checkpoint in {root}: give one as `ckpt_path`.")
        say(f"Going on from {path}" if path else f"There is no checkpoint in {root} yet: the run begins.")
        return None if path is None else str(path)
    if given == "best":
        return str(best_checkpoint(root, training))
    if given is None or given == "hpc" or str(given).startswith("registry"):
        return None if given is None else str(given)  # Lightning's business
    refuse_address(given)
    check(Path(given), training)
    return str(given)


def newest_checkpoint(root: Path, training: bool) -> Path | None:
    """The checkpoint with most steps of the newest run below a folder, or ``None`` if there is none at all.

    What cannot be gone on from is left out, and that is said. Runs are told apart by their folders, as ``version_3``,
    whose numbers tell which is newer: a clock may go back. Time decides where folders have no numbers.

    Raises:
        ConfigurationError: If there are checkpoints and none of them is of use.
    """
    # Not `last.ckpt` alone: after `kill -9` there may be none, and every run has a folder of its own.
    mistakes = []
    for path in best_first(checkpoints(root)):
        try:
            check(path, training)
        except ConfigurationError as error:
            mistakes.append(error)
            say(f"Left out: {error}")
        else:
            return path
    if mistakes:
        raise ConfigurationError(
            f"None of the {len(mistakes)} checkpoints in {root} can be gone on from: {mistakes[0]}"
        )
    return None


def best_checkpoint(root: Path, training: bool) -> Path:
    """The best checkpoint of the run that has the newest one below a folder, by the metric that it was to follow.

    Raises:
        ConfigurationError: If there is none, or the run followed no metric.
    """
    newest = newest_checkpoint(root, training)
    if newest is None:
        raise ConfigurationError(f"There is no checkpoint in {root}: give one as `ckpt_path`.")
    states = read_checkpoint(newest / SHARDED if newest.is_dir() else newest).get("callbacks")
    for state in states.values() if isinstance(states, dict) else ():
        if isinstance(state, dict) and state.get("monitor") is not None and state.get("best_model_path"):
            path = Path(str(state["best_model_path"]))
            path = path if path.exists() else newest.with_name(path.name)  # where the folder has moved
            check(path, training)
            say(f"The best by {state['monitor']} is {path}")
            return path
    raise ConfigurationError(
        f"The run of {newest} followed no metric to choose its best checkpoint by: give one as `ckpt_path`, or train "
        "with a ModelCheckpoint that has a `monitor`."
    )


def check(path: Path, training: bool) -> None:
    """Check that a run can go on from a checkpoint, which is a folder where the model is sharded.

    Raises:
        ConfigurationError: If it is damaged, none of Lightning's, or has less than is needed.
    """
    sharded = path.is_dir()
    # Of a folder, the file that Lightning writes last; tensors are in the others.
    content = read_checkpoint(path / SHARDED if sharded else path)
    if sharded:
        check_parts(path)
    if not {"pytorch-lightning_version", "loops", *(() if sharded else ("state_dict",))} <= content.keys():
        raise ConfigurationError(f"{path} is not a checkpoint of a run: give a `.ckpt` file that a run has saved.")
    with understood(path):
        for part in ("epoch", "global_step", "loops", "bilevel"):
            check_counters(part, content.get(part, 0))
    if training and not sharded and not content.get("optimizer_states"):
        raise ConfigurationError(
            f"{path} has weights alone, from which training cannot go on: give a checkpoint that was saved with "
            "`save_weights_only: false`."
        )


def check_counters(name: str, value: Any) -> None:
    """Check that what counts something is a number, in parts of a checkpoint that nobody else looks through.

    Raises:
        TypeError: If it is not.
    """
    if name in COUNTERS and not (type(value) is int and value >= 0):
        raise TypeError(f"`{name}` is {quoted(value)} and no number")
    for key, entry in value.items() if isinstance(value, dict) else ():
        check_counters(str(key), entry)


def checkpoints(root: Path) -> list[Path]:
    """All checkpoints below a folder, by their time; where times are equal, names decide."""
    found = []
    # Not `rglob`, which fails where a folder vanishes meanwhile.
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.suffix == ".ckpt" and not name.startswith(".") and path.exists():
                found.append((path.stat().st_mtime, str(path)))
    return [Path(path) for _, path in sorted(found)]


def best_first(paths: Sequence[Path]) -> Iterator[Path]:
    """Checkpoints in the order in which they are tried, given by their time."""
    runs: dict[Path, list[Path]] = {}
    latest: dict[tuple[Path, str], int] = {}
    for time, path in enumerate(paths):
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        runs.setdefault(run, []).append(path)
        latest[series(run)[0]] = time

    def newness(run: Path) -> tuple[int, int]:
        name, number = series(run)
        return latest[name], number

    for run in sorted(runs, key=newness, reverse=True):
        numbered = series(run)[1] >= 0
        yield from reversed(sorted(runs[run], key=steps_of) if numbered else runs[run])


def series(run: Path) -> tuple[tuple[Path, str], int]:
    """The runs that a run's folder is numbered among, and its number; -1 where it has none.

    Example:
        >>> series(Path("logs/version_10"))
        ((PosixPath('logs'), 'version_'), 10)
    """
    found = re.fullmatch(r"(.*?)(\d+)", run.name)
    return ((run.parent, found[1]), int(found[2])) if found else ((run, ""), -1)


def steps_of(path: Path) -> tuple[float, float]:
    """Steps and batches that a checkpoint was written after; infinite where it cannot be read, which is to be said."""
    try:
        content = torch.load(path / SHARDED if path.is_dir() else path, "cpu", mmap=True, weights_only=True)
        return content["global_step"], content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    except UNREADABLE:
        return math.inf, math.inf
