"""Two nodes of one process each, with a disk each or a slow one for both, stopped now and then."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from diopt_lightning.resuming.checkpoint_finding import checkpoints
from tests.interruptions import Run, assert_equal, final
from tests.test_interruptions import command

TRIALS = int(os.environ.get("TRIALS", "10"))
pytestmark = pytest.mark.slow


def on_two_nodes(root: Path, *options: str) -> list[str]:
    """Arguments of a run on two nodes of one process each."""
    return [*command(root, processes=2), "--trainer.num_nodes=2", "--trainer.devices=1", *options]


def test_nodes_with_a_disk_each_go_on_from_the_checkpoint_of_the_first(tmp_path):
    whole = Run(command(tmp_path / "whole", processes=2), tmp_path / "said", processes=2)
    assert whole.status() == 0, whole.said.read_text()
    own = tmp_path / "disk{rank}"
    first = Run(on_two_nodes(own, "--trainer.max_epochs=1"), tmp_path, processes=2, nodes=True)
    assert first.status() == 0, first.said.read_text()
    assert not checkpoints(tmp_path / "disk1")
    again = Run(on_two_nodes(own, "--ckpt_path=last"), tmp_path, processes=2, nodes=True)
    assert again.status() == 0, again.said.read_text()
    assert again.said.read_text().count("Going on from") == 1
    assert_equal(final(tmp_path / "disk0"), final(tmp_path / "whole"))
    for path in checkpoints(tmp_path / "disk0"):
        path.write_bytes(b"damaged")
    refused = Run(on_two_nodes(own, "--ckpt_path=last"), tmp_path, processes=2, nodes=True)
    assert refused.status() == 2
    assert refused.said.read_text().count("diopt: error: None of the") == 2


def test_nodes_that_read_other_tasks_are_refused(tmp_path):
    run = Run(on_two_nodes(tmp_path / "disk{rank}", "--data.tasks.seed={rank}"), tmp_path, processes=2, nodes=True)
    assert run.status() == 2
    assert run.said.read_text().count("diopt: error: Process 1 has other train and validation and dev instances") == 2


def test_nodes_that_write_to_one_slow_disk_and_are_stopped_now_and_then_end(tmp_path):
    draw = random.Random(0)
    for number in range(TRIALS):
        place = tmp_path / str(number)
        arguments = on_two_nodes(place, "--trainer.max_epochs=1")
        run = Run(arguments, tmp_path / "said", processes=2, nodes=True, slow_disk=place)
        end = time.monotonic() + draw.uniform(0, 3)
        while time.monotonic() < end:
            rank = draw.randrange(2)
            for signal_number, seconds in ((signal.SIGSTOP, draw.uniform(0, 0.3)), (signal.SIGCONT, 0.01)):
                with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                    run.send(signal_number, [rank])
                time.sleep(seconds)
        assert run.status() == 0, run.said.read_text()
        if number == 0:
            expected = final(place)
        assert_equal(final(place), expected)
    print(f"{TRIALS} of {TRIALS}")
