"""Checkpoints that are whole or not there, and damage that is never loaded."""

import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils._pytree import tree_flatten

from diopt_lightning import ConfigurationError
from diopt_lightning.errors import TrainingError
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.resuming import newest_checkpoint, run_folder, take_a_folder
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint
from diopt_lightning.resuming.checkpoint_writing import WholeCheckpoints
from tests.helpers import quiet_trainer
from tests.test_text_modules import data, optimization


@pytest.fixture
def real(blank_exemplars, tmp_path) -> Path:
    """A checkpoint of a run."""
    trainer = quiet_trainer(max_steps=3, limit_val_batches=0, plugins=[WholeCheckpoints()])
    trainer.fit(optimization(EmbedderDP(length=3)), data(blank_exemplars, tmp_path))
    trainer.save_checkpoint(tmp_path / "real.ckpt")
    return tmp_path / "real.ckpt"


def same(one: object, other: object) -> bool:
    """Whether two contents are bitwise equal."""
    (ones, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ones, others, strict=True)
    )


def loaded(path: Path) -> tuple[object, str]:
    """The content, or ``None`` and the error."""
    try:
        return WholeCheckpoints().load_checkpoint(path), ""
    except ConfigurationError as error:
        return None, str(error)


def test_damage_is_refused_or_harmless(real, tmp_path):
    whole, expected = real.read_bytes(), read_checkpoint(real)
    draw, outcomes = random.Random(0), {"refused": 0, "equal": 0}
    for number in range(150):
        damaged, place = bytearray(whole), draw.randrange(len(whole))
        if number % 3 == 0:
            del damaged[place:]
        elif number % 3 == 1:
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            damaged[place] = draw.choice([byte for byte in range(256) if byte != damaged[place]])
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(damaged)
        found, said = loaded(path)
        if found is None:
            assert str(path) in said
            assert "\n" not in said
        else:
            assert same(found, expected), (number, place)
        outcomes["refused" if found is None else "equal"] += 1
    print(outcomes)
    assert outcomes["refused"] >= 100  # what is harmless lies between the parts of the archive


def test_a_flipped_bit_of_a_weight_is_what_pytorch_would_have_loaded(real, tmp_path):
    content = bytearray(real.read_bytes())
    weight = read_checkpoint(real)["state_dict"]["instruction.weight"]
    content[content.find(weight.numpy().tobytes()) + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "flipped.ckpt")["state_dict"]["instruction.weight"], weight)
    with pytest.raises(ConfigurationError, match="checksum"):
        quiet_trainer(plugins=[WholeCheckpoints()]).strategy.load_checkpoint(tmp_path / "flipped.ckpt")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one_and_nothing_else(real, tmp_path, monkeypatch):
    before, names = real.read_bytes(), set(os.listdir(tmp_path))
    with pytest.raises(AttributeError):
        WholeCheckpoints().save_checkpoint({"of no use": lambda: None}, real)  # a local function has no pickle
    assert real.read_bytes() == before
    assert set(os.listdir(tmp_path)) == names
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        WholeCheckpoints().save_checkpoint({"state_dict": {}}, real)
    assert real.read_bytes() == before
    assert set(os.listdir(tmp_path)) == names


def test_a_missing_or_foreign_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigurationError, match=r"There is no file .*nowhere\.ckpt"):
        WholeCheckpoints().load_checkpoint(tmp_path / "nowhere.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ConfigurationError, match="is not a checkpoint"):
        WholeCheckpoints().load_checkpoint(tmp_path / "list.ckpt")
    torch.save({"of a class": ConfigurationError("x")}, tmp_path / "class.ckpt")
    with pytest.raises(ConfigurationError, match="Cannot read"):
        WholeCheckpoints().load_checkpoint(tmp_path / "class.ckpt")
    assert "of a class" in WholeCheckpoints().load_checkpoint(tmp_path / "class.ckpt", weights_only=False)


def test_a_file_that_the_disk_does_not_take_is_said_and_the_old_one_is_left(real, tmp_path):
    before, names = real.read_bytes(), set(os.listdir(tmp_path))
    content, limits = read_checkpoint(real), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"Cannot write the checkpoint .*real\.ckpt \(File too large\)"):
            WholeCheckpoints().save_checkpoint(content, real)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert real.read_bytes() == before
    assert set(os.listdir(tmp_path)) == names
    with pytest.raises(TrainingError, match=r"File exists.*`trainer\.default_root_dir`"):
        WholeCheckpoints().save_checkpoint(content, real / "below a file.ckpt")
    with pytest.raises(ConfigurationError, match=r"Cannot make the folder .*`trainer\.default_root_dir`"):
        take_a_folder(quiet_trainer(logger=CSVLogger(str(real))))


def test_the_last_checkpoint_has_the_most_steps_of_the_newest_run_whatever_the_clock_says(real, tmp_path):
    content, logs = read_checkpoint(real), tmp_path / "logs"
    for age, (place, step) in enumerate(
        [("version_10", 3), ("version_10", 30), ("version_10", 4), ("version_9", 50), ("version_2", 60)]
    ):
        path = logs / place / "checkpoints" / f"{step}.ckpt"
        WholeCheckpoints().save_checkpoint(content | {"global_step": step}, path)
        os.utime(path, (age, age))
    assert newest_checkpoint(logs, training=True) == logs / "version_10" / "checkpoints" / "30.ckpt"
    (logs / "version_10" / "checkpoints" / "30.ckpt").write_bytes(b"damaged")
    (logs / "version_11").mkdir()
    assert newest_checkpoint(logs, training=True) == logs / "version_10" / "checkpoints" / "4.ckpt"


@pytest.mark.parametrize("loggers", [[CSVLogger], [TensorBoardLogger], [TensorBoardLogger, CSVLogger]])
def test_runs_that_begin_at_the_same_moment_have_a_folder_each(loggers, tmp_path):
    (tmp_path / "lightning_logs" / "version_3").mkdir(parents=True)
    trainers = [quiet_trainer(logger=[each(str(tmp_path)) for each in loggers]) for _ in range(8)]
    for trainer in trainers[:4]:
        take_a_folder(trainer)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take_a_folder, trainers[4:]))
    versions = [{logger.version for logger in trainer.loggers} for trainer in trainers]
    assert sorted(versions, key=str) == sorted(({number} for number in range(4, 12)), key=str)
    assert {path.name for path in (tmp_path / "lightning_logs").iterdir()} == {f"version_{n}" for n in range(3, 12)}


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_is_given_is_that_of_one_run_at_a_time(named, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    loggers = [TensorBoardLogger, CSVLogger] if named else []

    def run() -> Trainer:
        made = [each(str(tmp_path), version="mine") for each in loggers]
        return quiet_trainer(logger=made or False, default_root_dir=tmp_path)

    busy = r"Another run is writing to the folder .*`version`"
    with take_a_folder(run()), pytest.raises(ConfigurationError, match=busy):
        take_a_folder(run())
    with take_a_folder(run()), ThreadPoolExecutor(1) as pool:  # a run that is over may be gone on with
        assert isinstance(pool.submit(take_a_folder, run()).exception(), ConfigurationError)
    take_a_folder(run()).close()
