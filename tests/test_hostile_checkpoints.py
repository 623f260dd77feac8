"""Checkpoints that say nonsense: a reading of the right types or one sentence, and nothing else."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diopt_lightning import ConfigurationError
from diopt_lightning.callbacks import LearnedInstructions
from diopt_lightning.cli import main
from diopt_lightning.export import SavedRun
from diopt_lightning.inspection.command import instructions
from diopt_lightning.inspection.page import page
from diopt_lightning.inspection.report import Report, load, select
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.modules import LinearWithWarmup
from diopt_lightning.resuming import OneForAll, find_checkpoint
from diopt_lightning.resuming.checkpoint_reading import understood
from diopt_lightning.resuming.training_state import check_training_state
from tests.audit import nothing_run_or_written_outside
from tests.helpers import quiet_trainer
from tests.runs import data, optimization
from tests.test_cli import small_run
from tests.test_strangers import one_sentence

DROPPED = object()
NONSENSE = [DROPPED, None, 3, -1, True, "nonsense", "\x1b[2J", [], {}, {"a": 1}, [[1]], float("nan")]
NONSENSE += [torch.zeros(2), b"a", {1}]
Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The way to every value within dictionaries and lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def put(content: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """A copy with another value in a place."""
    changed = inner = deepcopy(content)
    for key in place[:-1]:
        inner = inner[key]
    if value is DROPPED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return changed


def others(value: Any) -> list[Any]:
    """What may stand in the place of a value: nothing, another type or shape, or no number."""
    if not isinstance(value, torch.Tensor):
        return NONSENSE
    reshaped = [value.flatten()[:1] if value.dim() != 1 else value[None], value.long(), value.bool()]
    return [DROPPED, None, "nonsense", *reshaped, torch.full_like(value.float(), float("nan"))]


@pytest.fixture
def right(blank_exemplars, tmp_path) -> Path:
    """The checkpoint of a run."""
    trainer = quiet_trainer(max_steps=3, limit_val_batches=0, callbacks=[LearnedInstructions()])
    trainer.fit(optimization(EmbedderDP(length=2)), data(blank_exemplars, tmp_path))
    trainer.save_checkpoint(tmp_path / "right.ckpt")
    return tmp_path / "right.ckpt"


READERS: dict[str, Callable[[Path], object]] = {
    "table and page": lambda path: page(Report.of(load(path))),
    "selection": lambda path: select(load(path), "task*"),
    "JSON": lambda path: instructions(path, json=path.with_suffix(".json")),
    "export": lambda path: [SavedRun(path).learned, SavedRun(path).choose("task*"), SavedRun(path).embeddings()],
    "finding": lambda path: find_checkpoint(path, path.parent, training=True),
    "the best": lambda path: find_checkpoint("best", path.parent, training=False),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_is_read_as_a_run_has_saved_it_or_refused(reader, right, tmp_path):
    content, found, said = torch.load(right, weights_only=True), {"read": 0, "refused": 0}, []
    right.unlink()
    parts = ("loops", "callbacks", "bilevel", "epoch") if reader in ("finding", "the best") else ("instruction",)
    everywhere = list(places({part: content[part] for part in parts}))
    path = tmp_path / "changed.ckpt"

    @settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(everywhere), st.sampled_from(NONSENSE))
    def check(place: Place, value: Any) -> None:
        torch.save(put(content, place, value), path)
        try:
            with nothing_run_or_written_outside(tmp_path):
                READERS[reader](path)
            found["read"] += 1
        except ConfigurationError as error:
            found["refused"] += 1
            said.append(str(error))

    check()
    assert found["read"] or reader == "the best"  # this run chose none
    assert found["refused"]
    assert not any("\n" in each for each in said)
    print(reader, found)


def test_training_goes_on_from_what_was_saved_or_not_at_all(blank_exemplars, tmp_path):
    module, trainer = optimization(EmbedderDP(length=2)), quiet_trainer(max_steps=3, limit_val_batches=0)
    module.inner_level.make_scheduler = module.outer_level.make_scheduler = LinearWithWarmup
    trainer.fit(module, data(blank_exemplars, tmp_path))
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    found = {"read": 0, "refused": 0}
    places_of = {part: list(places({part: content[part]})) for part in ("optimizer_states", "lr_schedulers", "loops")}

    @settings(derandomize=True, database=None, deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
    @given(st.data(), st.sampled_from(list(places_of)))
    def check(choice: st.DataObject, part: str) -> None:
        place, value = choice.draw(st.sampled_from(places_of[part])), content
        for key in place:
            value = value[key]
        changed = put(content, place, choice.draw(st.sampled_from(others(value))))
        try:
            with understood(tmp_path):
                check_training_state(trainer, changed)
                trainer.fit_loop.load_state_dict(changed["loops"]["fit_loop"])
                trainer.strategy.load_optimizer_state_dict(changed)
                for config, state in zip(trainer.lr_scheduler_configs, changed["lr_schedulers"], strict=True):
                    config.scheduler.load_state_dict(state)
        except ConfigurationError:
            found["refused"] += 1
            return
        for config in trainer.lr_scheduler_configs:
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            config.scheduler.optimizer.step()
            config.scheduler.step()
        assert all(parameter.isfinite().all() for parameter in module.parameters())
        found["read"] += 1

    check()
    assert found["read"]
    assert found["refused"] >= 20


def test_weights_that_are_no_numbers_are_refused_by_name_and_a_missing_state_is_said(right, blank_exemplars, capfd):
    content, name = torch.load(right, weights_only=True), "backbone.model.shared.weight"

    def go_on() -> None:
        trainer = quiet_trainer(max_steps=4, limit_val_batches=0, callbacks=[LearnedInstructions()])
        trainer._checkpoint_connector = OneForAll(trainer)
        trainer.fit(optimization(EmbedderDP(length=2)), data(blank_exemplars, right.parent), ckpt_path=right)

    broken = torch.full_like(content["state_dict"][name], float("inf"))
    torch.save(put(content, ("state_dict", name), broken), right)
    for read in (go_on, lambda: SavedRun(right).state):
        with pytest.raises(ConfigurationError, match=f"`{name}` has values in the checkpoint that are NaN or infinite"):
            read()
    torch.save(put(content, ("optimizer_states", 0, "state", 0), DROPPED), right)
    go_on()
    assert f"no state of optimizer 1 for `{name}` (one of 1)" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_commands_end_with_one_sentence(tmp_path, capfd):
    arguments = [*small_run(tmp_path), "--test_after_fit=false"]
    assert main(["fit", *arguments, "--trainer.max_steps=3", "--trainer.limit_val_batches=0"]) == 0
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    (path,) = (folder / "checkpoints").iterdir()
    content, config = torch.load(path, weights_only=True), str(folder / "config.yaml")
    weight = ("state_dict", "backbone.model.shared.weight")
    fit, test = ["fit", *arguments, f"--ckpt_path={path}"], ["test", "--config", config, f"--ckpt_path={path}"]
    model = ["export", str(path), str(tmp_path / "model"), "--format=model"]
    weights = content["state_dict"][weight[1]]
    for place, value, command in [
        (weight, torch.full_like(weights, float("nan")), test),
        (weight, torch.full_like(weights, float("nan")), model),
        (("optimizer_states", 0, "state", 0), {"step": torch.tensor(1.0)}, fit),
        (("bilevel", "skipped", "in_a_row"), "three", fit),
        (("callbacks", "RandomState", "processes"), [3], fit),
        (("state_dict", "more"), torch.zeros(1), test),
        (("state_dict", "more"), torch.zeros(1), [*model[:-1], "--format=text"]),
        (weight, None, model),
        (weight, torch.zeros(1), test),
        (("optimizer_states", 0, "param_groups", 0, "params"), [0], fit),
        (("optimizer_states",), [], fit),
        (("callbacks", "LearnedInstructions", "moments"), [True], fit),
        (("BlankExemplarsDataModule", "inner"), 3, fit),
        (("bilevel", "inner_steps_taken"), "three", fit),
        (("loops", "fit_loop", "epoch_progress", "total", "ready"), [], fit),
        (("instruction", "learned", 0), 3, ["instructions", str(path)]),
    ]:
        torch.save(put(content, place, value), path)
        status = main(command)
        errors = capfd.readouterr().err
        assert status == 2 or "text" in command[-1], (place, errors)
        assert status == 0 or one_sentence(errors), place
    torch.save(content, path)
    closed = tmp_path / "closed.json"
    closed.mkdir()
    for target in (closed, tmp_path / "no folder" / "a.json", "/proc/a.json"):
        assert main(["instructions", str(path), "--json", str(target)]) == 2
        assert Path(target).name in one_sentence(capfd.readouterr().err)
