"""Runs of the command line that are killed or told to stop, and go on bitwise."""

import json
import os
import resource
import shlex
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data._utils import signal_handling

from diopt_lightning.cli import main
from diopt_lightning.data.workers import HoldingSignalsBack, leave_signals_to_the_main_process
from diopt_lightning.resuming.checkpoint_finding import checkpoints, newest_checkpoint
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint
from tests.interruptions import CHECKPOINT, FORK, Run, assert_equal, final
from tests.test_cli import small_run

EVERY_TWO = {"class_path": CHECKPOINT, "init_args": {"every_n_train_steps": 2, "save_last": True}}


@pytest.fixture(scope="module", autouse=True)
def _import_everything_once(tmp_path_factory) -> None:
    """Forked processes have what this one has imported."""
    root = tmp_path_factory.mktemp("first")
    assert main([*command(root), "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]) == 0


def command(root: Path, processes: int = 1, workers: int = 0) -> list[str]:
    """A small run that draws random numbers, accumulates at both levels, and saves after every second step."""
    several = ["--trainer.strategy=ddp"] if processes > 1 else []
    return [
        "fit",
        *small_run(root),
        *several,
        "--model.backbone.config.dropout_rate=0.1",
        "--model.inner_accumulation=2",
        "--model.outer_accumulation=2",
        "--model.max_new_tokens=2",
        f"--data.num_workers={workers}",
        "--test_after_fit=false",
        "--trainer.max_epochs=4",
        f"--trainer.devices={processes}",
        f"--trainer.callbacks={json.dumps([EVERY_TWO, {'class_path': CHECKPOINT}])}",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """What a run on so many processes comes to.

    Data loaders with workers draw a random number before the first batch, which others do not.
    """

    @cache
    def whole(processes: int, workers: int = 0) -> dict[str, Any]:
        root = tmp_path_factory.mktemp("whole")
        run = Run(command(root, processes, workers), root, processes)
        assert run.status() == 0, run.said.read_text()
        return final(root)

    return whole


@pytest.mark.parametrize(
    ("number", "processes", "ranks"),
    [
        (signal.SIGTERM, 1, [0]),
        pytest.param(signal.SIGINT, 1, [0], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, [1], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, [0, 1], marks=pytest.mark.slow),
    ],
)
def test_told_to_stop(number, processes, ranks, uninterrupted, tmp_path):
    workers = 2 * (number == signal.SIGINT)
    root = tmp_path / "stopped"
    run = Run(command(root, processes, workers), root, processes)
    assert run.wait_until(lambda: bool(checkpoints(root)))
    run.send(number, ranks)
    assert run.status() == 128 + number, run.said.read_text()
    said = run.said.read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("diopt: Stopped by")]
    assert line.startswith(f"diopt: Stopped by {number.name} at step ")
    assert "Traceback" not in said
    (saved,) = [path for path in checkpoints(root) if path.name.startswith("interrupted-")]
    assert newest_checkpoint(root, training=True) == saved
    going_on = shlex.split(line.split("To go on: ")[1])
    assert going_on == ["diopt", "fit", "--config", str(saved.parents[1] / "config.yaml"), "--ckpt_path", "last"] or (
        going_on[3] == str((saved.parents[1] / "config.yaml").relative_to(Path.cwd()))
    )
    again = Run(going_on[1:], root, processes)
    assert again.status() == 0, again.said.read_text()
    assert_equal(final(root), uninterrupted(processes, workers))


class Told(Callback):
    """Is told to end by SIGTERM at some moment of a run."""

    def __init__(self, when: str) -> None:
        setattr(self, when, lambda *_, **__: signal.raise_signal(signal.SIGTERM))


@pytest.mark.parametrize(
    ("subcommand", "when", "said"),
    [
        ("fit", "on_train_start", "diopt: Stopped by SIGTERM at step 0"),  # after a batch, of which a step takes two
        ("validate", "on_validation_batch_start", ""),
    ],
)
def test_told_to_stop_before_and_beside_training(subcommand, when, said, tmp_path):
    told = f"--trainer.callbacks={json.dumps([{'class_path': f'{__name__}.Told', 'init_args': {'when': when}}])}"
    run = Run([subcommand, *command(tmp_path)[1:-1], "--trainer.num_sanity_val_steps=0", told], tmp_path)
    assert run.status() in (128 + signal.SIGTERM, -signal.SIGTERM), run.said.read_text()
    assert said in run.said.read_text()
    assert "Traceback" not in run.said.read_text()


def test_workers_that_are_just_starting_are_told_to_stop(monkeypatch):
    started = signal_handling._set_worker_signal_handlers
    monkeypatch.setattr(
        signal_handling, "_set_worker_signal_handlers", lambda: (started(), os.killpg(0, signal.SIGTERM))
    )

    def fetch() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, lambda *_: None)
        workers = {"num_workers": 2, "worker_init_fn": leave_signals_to_the_main_process}
        assert len(list(HoldingSignalsBack(range(8), batch_size=2, **workers))) == 4  # type: ignore[arg-type]

    main_process = FORK.Process(target=fetch)
    main_process.start()
    main_process.join()
    assert main_process.exitcode == 0


def test_a_group_of_processes_is_told_to_stop(tmp_path):
    """As by a scheduler that sends SIGTERM to everything in a job, workers included."""
    run = Run(command(tmp_path / "run", workers=2), tmp_path)
    assert run.wait_until(lambda: bool(checkpoints(tmp_path / "run")))
    run.send_all(signal.SIGTERM)
    assert run.status() == 143, run.said.read_text()
    assert any(path.name.startswith("interrupted-") for path in checkpoints(tmp_path / "run"))


@pytest.mark.slow
def test_goes_on_from_the_end_of_an_epoch(uninterrupted, tmp_path):
    assert main([*command(tmp_path), "--trainer.max_epochs=1"]) == 0
    (path,) = tmp_path.rglob("epoch=0-step=4-v1.ckpt")
    assert read_checkpoint(path)["loops"]["fit_loop"]["epoch_progress"]["total"]["processed"] == 1
    assert main([*command(tmp_path / "again"), f"--ckpt_path={path}"]) == 0
    assert_equal(final(tmp_path / "again"), uninterrupted(1))


def test_the_last_checkpoint_is_the_newest_sound_one_and_a_finished_run_says_so(tmp_path, capfd):
    arguments = [*command(tmp_path), "--ckpt_path=last", "--trainer.max_epochs=1"]
    assert main(arguments) == 0
    assert "no checkpoint" in capfd.readouterr().err
    path = newest_checkpoint(tmp_path, training=True)
    assert path is not None
    (tmp_path / "zzz.ckpt").write_bytes(path.read_bytes()[:-1000])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "unfinished.ckpt").mkdir()  # of a sharded model, killed before the last of its files
    assert main(arguments) == 0
    said = capfd.readouterr().err
    assert f"Going on from {path}" in said
    assert f"Left out: Cannot read {tmp_path / 'zzz.ckpt'} as a checkpoint" in said
    assert "foreign.ckpt is not a checkpoint of a run" in said
    assert f"Left out: There is no file {tmp_path / 'unfinished.ckpt' / 'meta.pt'}" in said
    assert "The run was finished already, at step 4: raise `trainer.max_epochs`" in said


def test_what_is_given_counts_and_differences_are_said(tmp_path, capfd):
    assert main([*command(tmp_path), "--trainer.max_epochs=1"]) == 0
    before = final(tmp_path)
    changes = ["--model.inner_optimizer.init_args.lr=0.25", "--model.inner_optimizer.init_args.weight_decay=0"]
    capfd.readouterr()
    assert main([*command(tmp_path), "--trainer.max_epochs=2", "--ckpt_path=last", *changes]) == 0
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if "is changed" in line]
    assert len(lines) == 3
    assert "`model.init_args.inner_optimizer.init_args.lr` is 0.25 and was 0.0005 in the checkpoint" in said
    (inner, outer), (inner_before, outer_before) = (
        [state["param_groups"][0] for state in content["optimizer_states"]] for content in (final(tmp_path), before)
    )
    assert (inner["lr"], inner["weight_decay"]) == (0.25, 0)
    assert {name for name in inner if inner[name] != inner_before[name]} == {"lr", "weight_decay"}
    assert outer == outer_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_path=nowhere.ckpt"], "There is no file nowhere.ckpt"),
        (["--ckpt_path={damaged}"], "Cannot read {damaged} as a checkpoint"),
        (["--ckpt_path={weights}"], "{weights} has weights alone"),
        (["--model.instruction.candidates=2"], "`instruction.logits` has the shape"),
        (["--model.instruction=diopt_lightning.instructions.EmbedderDP"], "with the instruction ExtractorDP, and"),
        (["--model.backbone.config.d_model=32"], "has the shape"),
        (["--data.tasks.train_tasks=5"], "is for 4 train tasks, and the data has 5"),
        (["--model.hypergradient=diopt_lightning.bilevel.Identity"], "the state of Neumann"),
    ],
)
def test_a_checkpoint_that_does_not_fit_ends_with_one_line(options, message, stopped_run, tmp_path, capfd):
    damaged, weights = tmp_path / "damaged.ckpt", tmp_path / "weights.ckpt"
    damaged.write_bytes(stopped_run.read_bytes()[:-1])
    torch.save({name: value for name, value in read_checkpoint(stopped_run).items() if "opt" not in name}, weights)
    filled = [option.format(damaged=damaged, weights=weights) for option in options]
    assert main([*command(tmp_path), f"--ckpt_path={stopped_run}", *filled]) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("diopt: error:")]
    assert message.format(damaged=damaged, weights=weights) in line


@pytest.mark.parametrize(
    ("option", "limit", "status", "message"),
    [
        ("", 100_000, 1, "(File too large); those that were written before are whole: make room"),
        ("--trainer.default_root_dir=a_file", None, 2, "Cannot make the folder"),
        ("--data.cache_dir=a_file/cache", None, 2, "set `data.cache_dir` to a folder that can be written to"),
    ],
)
def test_a_disk_that_does_not_take_a_file_ends_with_one_line(option, limit, status, message, stopped_run, capfd):
    root = stopped_run.parents[3]
    Path("a_file").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path: path.read_bytes() for path in checkpoints(root)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or limits[0], limits[1]))
    try:
        found = main([*command(root), *filter(None, [option])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capfd.readouterr().err
    assert found == status, errors
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("diopt: error:")]
    assert message in line
    assert {path: path.read_bytes() for path in checkpoints(root)} == before


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    """The checkpoint of a run."""
    root = tmp_path_factory.mktemp("stopped")
    assert main([*command(root), "--trainer.max_epochs=1"]) == 0
    path = newest_checkpoint(root, training=True)
    assert path is not None
    return path
