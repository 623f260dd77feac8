"""Runs of the command line in forked processes, which need not import anything again, to be stopped at any moment."""

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path

from diopt_lightning.cli import main
from diopt_lightning.resuming.checkpoint_finding import newest_checkpoint
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint

FORK = get_context("fork")
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


class Run:
    """A run of ``diopt`` on one or two processes, in a process group of its own.

    Args:
        arguments: Those of the command line; ``{rank}`` stands for the number of each process.
        folder: Where what the run says and the numbers of its processes are kept.
        processes: How many.
        nodes: Whether each process is a node.
        slow_disk: A folder in which all that is opened, renamed or removed takes up to 50 ms longer.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        processes: int = 1,
        nodes: bool = False,
        slow_disk: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.said = folder / "said.txt"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self._places = [folder / f"{rank}.pid" for rank in range(processes)]
        for place in self._places:
            place.unlink(missing_ok=True)
        places = self._places
        self._leader: Any = FORK.Process(target=lead, args=(arguments, self.said, places, port, nodes, slow_disk))
        self._leader.start()

    def wait_until(self, happened: Callable[[], bool], seconds: float = 120.0, pause: float = 0.002) -> bool:
        """Wait for something; return whether it happened before the run ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._leader.is_alive():
            if happened():
                return True
            time.sleep(pause)
        assert time.monotonic() < end, self.said.read_text()
        return False

    def kill(self) -> None:
        """End all processes of the run as a power cut would."""
        if self._leader.is_alive():
            os.killpg(self._leader.pid, signal.SIGKILL)
        self._leader.join()

    def send(self, number: int, ranks: Sequence[int] = (0,)) -> None:
        """Send a signal to some of the processes."""
        for rank in ranks:
            os.kill(int(self._places[rank].read_text()), number)

    def send_all(self, number: int) -> None:
        """Send a signal to all processes of the run, workers included."""
        os.killpg(self._leader.pid, number)

    def status(self, seconds: float = 180.0) -> int:
        """Wait for the end, and return the exit status of the first process."""
        self._leader.join(seconds)
        if self._leader.is_alive():
            self.kill()
            raise AssertionError(f"The run did not end: {self.said.read_text()}")
        code: int = self._leader.exitcode
        return code


def lead(
    arguments: Sequence[str], said: Path, places: list[Path], port: int, nodes: bool, slow_disk: Path | None
) -> None:
    """Start the processes of a run, and end with the status of the first."""
    os.setpgid(0, 0)
    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if slow_disk is not None:
        delay_files(slow_disk)
    if len(places) == 1:
        take_part(arguments, 0, places, port, nodes)
    ranks = [FORK.Process(target=take_part, args=(arguments, rank, places, port, nodes)) for rank in range(len(places))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(process.exitcode or 0 for process in ranks) if nodes else ranks[0].exitcode)


def delay_files(folder: Path) -> None:
    """Let this process and those that it starts wait before they open, rename or remove anything in a folder."""
    draw = random.SystemRandom()  # which takes nothing from the random numbers of the run

    def delay(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(str(folder)):
            time.sleep(draw.uniform(0, 0.05))

    sys.addaudithook(delay)


def take_part(arguments: Sequence[str], rank: int, places: list[Path], port: int, nodes: bool) -> None:
    """Run the command line as one of several processes, as Lightning would have started it."""
    torch.set_num_threads(1)
    # Or else Lightning gives the only process of a node all cores, for which a forked process has no threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["diopt", *(argument.replace("{rank}", str(rank)) for argument in arguments)]
    if len(places) > 1:
        found = {
            "LOCAL_RANK": 0 if nodes else rank,
            "RANK": rank,
            "NODE_RANK": rank if nodes else 0,
            "WORLD_SIZE": len(places),
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in found.items()}, MASTER_ADDR="localhost")
    places[rank].write_text(str(os.getpid()))
    sys.exit(main())


def final(root: Path) -> dict[str, Any]:
    """What a run has come to."""
    path = newest_checkpoint(root, training=True)
    assert path is not None
    return read_checkpoint(path)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that two runs have come to the same."""
    parts = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "bilevel")
    (values, structure), (wanted, structure_wanted) = (
        tree_flatten_with_path([c.get(part) for part in parts]) for c in (found, expected)
    )
    assert structure == structure_wanted
    for (path, value), (_, other) in zip(values, wanted, strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, path
