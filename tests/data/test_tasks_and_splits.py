"""Reading the official layout: what is right is read in full, what is wrong gets one error that names it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from diopt_lightning import ConfigurationError
from diopt_lightning.data import BlankExemplarsDataModule, Example, NaturalInstructionsDataModule
from diopt_lightning.data.splits import TaskSplits, count_tasks, draw_tasks
from diopt_lightning.data.tasks import read_task
from tests.conftest import task_document


def test_reads_every_field(layout):
    task = read_task(layout() / "tasks" / "task003.json")
    assert (task.name, task.category, task.definitions) == ("task003", "Label Recall", ("Name the castle",))
    assert task.positive_examples[1] == Example("apple 1", "river 1", "storm")
    assert task.negative_examples == (Example("bear", "boat", ""),)
    assert (task.instances[2].id, task.instances[2].outputs) == ("task003-2", ("fire", "fish"))


def test_reads_all_real_tasks(real_data):
    tasks = [read_task(path) for path in sorted((real_data / "tasks").glob("*.json"))]
    assert len(tasks) == 320
    assert sum(len(task.instances) for task in tasks) == 31874
    assert sum(not output for task in tasks for instance in task.instances for output in instance.outputs) == 1


INSTANCE = {"id": "a", "input": "b", "output": ["c"]}
EXAMPLE = {"input": "a", "output": "b"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"\xff\xfe{}", "is not UTF-8"),
        (b'{"Definition": ', "is not valid JSON: line 1"),
        (["a list"], "expected a JSON object"),
        (b"[" * 100_000, "is JSON that cannot be read"),
        (task_document(Definition=None), "the field `Definition` is missing"),
        (task_document(Definition=[]), r"\['Definition'\]: expected a list of strings that is not empty"),
        (task_document(Definition=["  "]), r"\['Definition'\]: expected strings that are not empty"),
        (task_document(Categories=None), "the field `Categories` is missing"),
        (task_document(Instances=None), "the field `Instances` is missing"),
        (task_document(Instances=[]), r"\['Instances'\]: expected a list that is not empty"),
        (task_document(Instances=["text"]), r"field \['Instances'\]\[0\]: expected a JSON object, got \"text\""),
        (task_document(Instances=[INSTANCE, INSTANCE | {"output": "c"}]), r"\['Instances'\]\[1\]\['output'\]"),
        (task_document(Instances=[INSTANCE | {"output": [1]}]), "expected a list of strings"),
        (task_document(Instances=[INSTANCE | {"output": []}]), "expected a list of strings that is not empty"),
        (task_document(Instances=[INSTANCE | {"input": ""}]), r"\['input'\]: expected a string that is not empty"),
        (task_document(Instances=[{"id": "a", "output": ["c"]}]), "the field `input` is missing"),
        (task_document(**{"Positive Examples": [EXAMPLE | {"output": ["b"]}]}), r"\['Positive Examples'\]\[0\]"),
        (task_document(**{"Negative Examples": {}}), r"\['Negative Examples'\]: expected a list"),
    ],
)
def test_a_bad_task_file_gets_one_error_with_file_and_field(layout, document, message):
    root = layout({"task003": document})
    with pytest.raises(ConfigurationError, match=message) as caught:
        NaturalInstructionsDataModule(str(root), str(root / "tokenizer")).prepare_data()
    assert "task003.json" in str(caught.value)


def test_a_missing_task_file_is_named(layout):
    root = layout()
    (root / "tasks" / "task003.json").unlink()
    with pytest.raises(ConfigurationError, match=r"task003\.json: No such file.*remove `task003` from the split list"):
        NaturalInstructionsDataModule(str(root), str(root / "tokenizer")).prepare_data()


def test_lists_of_the_layout_are_used_and_others_are_drawn(layout):
    root = layout(dev=["task050", "task051"])
    data = NaturalInstructionsDataModule(str(root), str(root / "tokenizer"), validation_tasks=3)
    assert data.splits.dev == ("task050", "task051")
    assert data.splits.test == ("task100", "task101")
    assert len(data.splits.validation) == 3
    assert sorted(data.splits.train + data.splits.validation) == [f"task{i:03d}" for i in range(8)]
    assert [task.name for task in data.tasks[:5]] == list(data.splits.train)


def test_real_splits_are_disjoint_and_stratified(real_data, t5_tokenizer):
    data = NaturalInstructionsDataModule(str(real_data), str(t5_tokenizer), validation_tasks=0.1, dev_tasks=15)
    splits = data.splits
    assert [len(names) for names in (splits.train, splits.validation, splits.dev, splits.test)] == [250, 30, 15, 25]
    # 94 of the 295 tasks are question answering, a share of 9 to 10 among 30.
    assert sum(task.category == "Question Answering" for task in data.split_tasks("validation")) in (9, 10)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": ["task001", "task001"]}, r"train_tasks\.txt names the task `task001` twice"),
        ({"test": ["task001"]}, "`task001` is named in train and again in test"),
        ({"dev": ["task100"]}, "`task100` is named in dev and again in test"),
        ({"validation": ["task001"]}, "`task001` is named in train and again in validation"),
    ],
)
def test_a_task_named_twice_is_an_error(layout, lists, message):
    root = layout(**lists)
    with pytest.raises(ConfigurationError, match=message):
        NaturalInstructionsDataModule(str(root), str(root / "tokenizer")).prepare_data()


def test_bad_lists_and_folders_are_named(layout, tmp_path):
    root = layout()
    with pytest.raises(ConfigurationError, match=r"There is no folder nowhere: set `data.root`"):
        NaturalInstructionsDataModule("nowhere", "tokenizer").prepare_data()
    with pytest.raises(ConfigurationError, match=r"no split folder.*xlingual.*there are \['default'\]"):
        NaturalInstructionsDataModule(str(root), "tokenizer", split="xlingual").prepare_data()
    train = root / "splits" / "default" / "train_tasks.txt"
    for content, message in [
        (b"\n \n", "names no task"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"../../secret\n", "a name is that of a file in `tasks/`, no path"),
    ]:
        train.write_bytes(content)
        with pytest.raises(ConfigurationError, match=message):
            NaturalInstructionsDataModule(str(root), "tokenizer").prepare_data()
    train.unlink()
    with pytest.raises(ConfigurationError, match=r"Cannot read the split list .*train_tasks\.txt"):
        NaturalInstructionsDataModule(str(root), "tokenizer").prepare_data()


@pytest.mark.parametrize(
    ("wanted", "available", "count"), [(0, 10, 0), (0.1, 10, 1), (0.11, 10, 2), (0.01, 10, 1), (3, 10, 3)]
)
def test_counts_are_numbers_or_fractions(wanted, available, count):
    assert count_tasks("data.dev_tasks", wanted, available) == count


@pytest.mark.parametrize("wanted", [-1, 1.5, 10, 11])
def test_impossible_counts_are_named(wanted):
    with pytest.raises(ConfigurationError, match=rf"`data.dev_tasks` .*{re.escape(str(wanted))}"):
        count_tasks("data.dev_tasks", wanted, 10)


def test_draws_are_stratified_and_depend_on_the_seed_alone():
    categories = {f"task{i}": "abc"[i % 3] if i < 60 else "d" for i in range(80)}
    drawn, left = draw_tasks(categories, 20, seed=0)
    assert sorted([*drawn, *left]) == sorted(categories)
    assert sorted(categories[name] for name in drawn) == [c for c in "abcd" for _ in range(5)]
    assert draw_tasks(dict(reversed(categories.items())), 20, seed=0)[0] == drawn[::-1]
    assert draw_tasks(categories, 20, seed=1)[0] != drawn


def test_whole_categories_are_held_out():
    categories = {f"task{i}": "abcdef"[i % 6] for i in range(60)}
    drawn, left = draw_tasks(categories, 25, seed=0, whole_categories=True)
    assert len(drawn) == 20
    assert not {categories[name] for name in drawn} & {categories[name] for name in left}
    with pytest.raises(ConfigurationError, match=r"No whole category fits into 5 task\(s\): the smallest has 10"):
        draw_tasks(categories, 5, seed=0, whole_categories=True)


def test_no_train_tasks_left_is_an_error():
    with pytest.raises(ConfigurationError, match="no train tasks left"):
        TaskSplits((), ("a",), (), ("b",))


def test_the_manifest_of_written_tasks_is_stable(blank_exemplars, tmp_path):
    blank_exemplars.write(tmp_path / "a")
    blank_exemplars.write(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 14
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    document = json.loads((tmp_path / "a" / "tasks" / "task001_label_train.json").read_text())
    assert sorted(example["output"] == "blank" for example in document["Positive Examples"]) == [False, True, True]


def test_written_tasks_are_never_there_in_part_and_left_where_they_are_the_same(blank_exemplars, tmp_path, monkeypatch):
    def states() -> dict[Path, tuple[int, int]]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    blank_exemplars.write(tmp_path)
    before = states()
    blank_exemplars.write(tmp_path)
    assert states() == before
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("interrupted")))
    with pytest.raises(OSError, match="interrupted"):
        replace(blank_exemplars, seed=1).write(tmp_path)
    assert states() == before


def test_an_experiment_without_dev_tasks_has_all_its_train_tasks(blank_exemplars, tmp_path):
    data = BlankExemplarsDataModule(str(tmp_path), blank_exemplars)
    data.prepare_data()
    assert len(data.splits.dev) == 2
    data = BlankExemplarsDataModule(str(tmp_path), replace(blank_exemplars, dev_tasks=0))
    data.prepare_data()
    assert (len(data.splits.train), len(data.splits.dev)) == (4, 0)
