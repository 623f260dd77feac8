"""Runs of eight kinds that are killed at random moments, up to three times each, and end as those that were not."""

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from diopt_lightning.resuming.checkpoint_finding import checkpoints
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint
from tests.interruptions import CHECKPOINT, Run, assert_equal, final
from tests.test_cli import small_run

POINTS = int(os.environ.get("POINTS", "2"))  # of each kind; 5 make 40
Whole = Callable[["Kind"], tuple[dict[str, Any], float]]
INSTRUCTIONS, ESTIMATORS = "diopt_lightning.instructions", "diopt_lightning.bilevel"


@dataclass(frozen=True)
class Kind:
    """A kind of run: options beside those of all, the processes it runs on, and the workers of each loader."""

    options: tuple[str, ...] = ()
    every: int = 2
    processes: int = 1
    workers: int = 0

    def command(self, root: Path) -> list[str]:
        """Return the arguments of a small run that draws random numbers and is saved every few steps."""
        every = {"class_path": CHECKPOINT, "init_args": {"every_n_train_steps": self.every, "save_last": True}}
        return [
            "fit",
            *small_run(root),
            "--model.backbone.config.dropout_rate=0.1",
            "--model.max_new_tokens=2",
            f"--data.num_workers={self.workers}",
            "--test_after_fit=false",
            "--trainer.max_epochs=4",
            f"--trainer.devices={self.processes}",
            *(["--trainer.strategy=ddp"] if self.processes > 1 else []),
            f"--trainer.callbacks={json.dumps([every, {'class_path': CHECKPOINT}])}",
            *(f"--{option}" for option in self.options),
        ]


KINDS = {
    "exemplars of tasks, accumulated": Kind(("model.inner_accumulation=2", "model.outer_accumulation=2")),
    "soft, validated within epochs, with workers": Kind(
        (
            f"model.instruction={INSTRUCTIONS}.EmbedderDP",
            "model.instruction.length=3",
            f"model.hypergradient={ESTIMATORS}.Chebyshev",
            "model.inner_steps=3",
            "trainer.val_check_interval=3",
        ),
        workers=2,
    ),
    "exemplars of instances, validated in every other epoch": Kind(
        (
            f"model.instruction={INSTRUCTIONS}.ExtractorIC",
            "model.instruction.candidate_length=32",
            f"model.hypergradient={ESTIMATORS}.MinRes",
            "model.inner_accumulation=3",
            "trainer.check_val_every_n_epoch=2",
        ),
        every=3,
    ),
    "unrolled, soft of instances, never validated": Kind(
        (
            f"model.instruction={INSTRUCTIONS}.EmbedderIC",
            f"model.hypergradient={ESTIMATORS}.Unrolled",
            "model.inner_steps=2",
            "model.outer_batches=2",
            "trainer.limit_val_batches=0",
        ),
        every=1,
    ),
    "penalty, from definitions, with schedules": Kind(
        (
            f"model.instruction={INSTRUCTIONS}.EmbedderFromDefinition",
            f"model.hypergradient={ESTIMATORS}.Penalty",
            "model.inner_scheduler=diopt_lightning.modules.LinearWithWarmup",
            "model.inner_scheduler.warmup_steps=3",
            "model.outer_gradient_clip=1.0",
            "trainer.max_epochs=3",
        ),
    ),
    "plain tuning, with loaders made anew": Kind(
        (
            "model=diopt_lightning.InstructionTuning",
            "model.inner_accumulation=2",
            "trainer.reload_dataloaders_every_n_epochs=1",
        ),
        workers=2,
    ),
    "two processes, drawn exemplars": Kind(
        (
            f"model.instruction.relaxation={INSTRUCTIONS}.GumbelStraightThrough",
            "model.inner_steps=2",
            "model.outer_accumulation=2",
        ),
        every=3,
        processes=2,
    ),
    "two processes, soft, validated across epochs, with workers": Kind(
        (
            f"model.instruction={INSTRUCTIONS}.EmbedderDP",
            "model.instruction.length=3",
            f"model.hypergradient={ESTIMATORS}.Nystrom",
            "model.hypergradient.damping=10.0",
            "trainer.val_check_interval=3",
            "trainer.check_val_every_n_epoch=null",
        ),
        processes=2,
        workers=2,
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Whole:
    """What a run of a kind comes to, and how long it takes from its first checkpoint on."""

    @cache
    def whole(kind: Kind) -> tuple[dict[str, Any], float]:
        root = tmp_path_factory.mktemp("whole")
        run = Run(kind.command(root), root / "said", kind.processes)
        run.wait_until(lambda: bool(checkpoints(root)))
        begin = time.monotonic()
        assert run.status() == 0, run.said.read_text()
        return final(root), time.monotonic() - begin

    return whole


def killed(kind: Kind, root: Path, duration: float, draw: random.Random, kills: int, while_writing: bool) -> list[int]:
    """Kill a run and those that go on from it, let the last one end, and return the steps that each was saved at."""
    steps: list[int] = []
    for number in range(kills):
        run = Run([*kind.command(root), *["--ckpt_path=last"] * bool(number)], root / "said", kind.processes)
        before = set(checkpoints(root))
        run.wait_until(lambda before=before: bool(set(checkpoints(root)) - before))
        time.sleep(draw.random() * 0.8 * duration / kills)  # a run that has ended is drawing its pictures
        if while_writing:
            run.wait_until(lambda: any((root / "lightning_logs").rglob("*.part")), pause=0.0)
        run.kill()
        for path in checkpoints(root):
            read_checkpoint(path)
        steps.append(final(root)["global_step"])
    again = Run([*kind.command(root), "--ckpt_path=last"], root / "said", kind.processes)
    assert again.status() == 0, again.said.read_text()
    return steps


def survive(kind: Kind, root: Path, whole: Whole, points: int, seed: int) -> None:
    """Kill runs of a kind at random moments, one to three times, and compare each with one that was not stopped."""
    draw = random.Random(seed)
    expected, duration = whole(kind)
    for number in range(points):
        place, while_writing = root / str(number), number % 2 == 1
        steps = killed(kind, place, duration, draw, kills=1 + number % 3, while_writing=while_writing)
        assert_equal(final(place), expected)
        print(f"killed when {steps} of {expected['global_step']} steps were saved: bitwise equal")
    print(f"{points} of {points}")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_killed_at_random_moments(name, uninterrupted, tmp_path):
    survive(KINDS[name], tmp_path, uninterrupted, POINTS, seed=list(KINDS).index(name))
