"""What was learned, to look at: numbers against slow versions, the callback in small runs, the command's outputs."""

import csv
import html
import io
import itertools
import json
import math
import tempfile
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diopt_lightning import ConfigurationError, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.callbacks import LearnedInstructions, RandomState, Results
from diopt_lightning.cli import main
from diopt_lightning.errors import TrainingError, printable
from diopt_lightning.export import export_adapter, export_embeddings, export_text
from diopt_lightning.export.folder import file_name
from diopt_lightning.inspection import Report, load, page, picture, select, show
from diopt_lightning.inspection.diversity import (
    effective_rank,
    mean_pairwise_cosine_distance,
    task_vectors,
    two_dimensional,
)
from diopt_lightning.inspection.report import as_json
from diopt_lightning.inspection.terminal import markdown, tasks_table
from diopt_lightning.instructions import (
    ChosenExemplar,
    Description,
    EmbedderDP,
    Instruction,
    RandomExemplar,
)
from tests.conftest import TINY_T5
from tests.forms import FORMS
from tests.helpers import quiet_trainer
from tests.runs import data, optimization

KINDS = {
    "embedder": FORMS["embedder"].make,
    "extractor": FORMS["soft"].make,
    "weights": FORMS["task_weights"].make,
    "composition": FORMS["composition"].make,
}


def slow_distance(vectors: torch.Tensor) -> float:
    pairs = list(itertools.combinations(vectors, 2))
    return sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in pairs) / len(pairs)


def slow_rank(vectors: torch.Tensor) -> float:
    singular = [math.sqrt(max(0.0, value)) for value in torch.linalg.eigvalsh(vectors @ vectors.T).tolist()]
    shares = [value / sum(singular) for value in singular]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


@pytest.mark.parametrize(("tasks", "dim"), [(2, 5), (6, 3), (9, 40)])
def test_diversity_is_that_of_slow_and_obvious_versions(tasks, dim):
    vectors = torch.randn(tasks, dim, dtype=torch.float64) + 0.3
    assert mean_pairwise_cosine_distance(vectors) == pytest.approx(slow_distance(vectors), abs=1e-12)
    assert effective_rank(vectors) == pytest.approx(slow_rank(vectors), rel=1e-6)
    assert mean_pairwise_cosine_distance(5 * vectors) == pytest.approx(slow_distance(vectors), abs=1e-12)
    assert effective_rank(5 * vectors) == pytest.approx(effective_rank(vectors))


def test_diversity_at_the_edges():
    one, equal, zero = torch.randn(1, 4), torch.randn(1, 4).expand(5, 4), torch.zeros(3, 4)
    assert (mean_pairwise_cosine_distance(one), effective_rank(one)) == (0.0, pytest.approx(1.0))
    assert mean_pairwise_cosine_distance(equal) == pytest.approx(0.0, abs=1e-12)
    assert effective_rank(equal) == pytest.approx(1.0)
    assert (mean_pairwise_cosine_distance(zero), effective_rank(zero)) == (1.0, 0.0)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert mean_pairwise_cosine_distance(opposite) == pytest.approx(2.0)
    tiny = torch.tensor([[1e-30, 0.0], [0.0, 1e30]])
    assert mean_pairwise_cosine_distance(tiny) == pytest.approx(1.0)


def test_the_vector_of_a_task_is_the_mean_of_its_embeddings():
    rows = [torch.randn(3, 4), torch.randn(7, 4, dtype=torch.bfloat16), torch.zeros(0, 4)]
    vectors = task_vectors(rows)
    assert vectors.dtype == torch.float64
    assert torch.allclose(vectors[0], rows[0].double().mean(dim=0))
    assert torch.allclose(vectors[1], rows[1].double().mean(dim=0))
    assert not vectors[2].any()


def test_two_dimensions_are_the_principal_components_of_both_together():
    learned, human = torch.randn(6, 5), torch.randn(4, 5) + 2
    plane = two_dimensional(learned, human)
    rows = torch.cat([learned, human]).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    for axis in (0, 1):
        expected = (rows - rows.mean(dim=0)) @ vectors[:, -1 - axis]
        found = torch.cat([plane.learned, plane.human])[:, axis]
        assert torch.allclose(found.abs(), expected.abs())
        assert plane.share[axis] == pytest.approx((values[-1 - axis] / values.sum()).item())
    # The sign depends on the directions alone, and not on the order of the tasks.
    turned = two_dimensional(learned.flip(0), human.flip(0))
    assert torch.allclose(turned.learned.flip(0), plane.learned)
    assert two_dimensional(torch.ones(1, 1), torch.zeros(1, 1)).learned.tolist() == [[0.5, 0.0]]
    equal = two_dimensional(torch.full((3, 4), 0.1), torch.full((2, 4), 0.1))
    assert not equal.learned.any()
    assert equal.share == (0.0, 0.0)


def fit(instruction: Instruction | None, experiment: Any, root: Path, *callbacks: pl.Callback, **options: Any) -> Any:
    """Train a little with the callback; return the trainer."""
    if instruction is None or isinstance(instruction, RandomExemplar):
        module: Any = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), instruction, max_new_tokens=3)
    else:
        module = optimization(instruction)
    path = options.pop("ckpt_path", None)
    every = [RandomState(), *(callbacks or (LearnedInstructions(),))]
    options = {"max_steps": 6, "limit_val_batches": 0, "default_root_dir": root} | options
    torch.manual_seed(0)
    trainer = quiet_trainer(callbacks=every, **options)
    trainer.fit(module, data(experiment, root / "data"), ckpt_path=path)
    return trainer


@pytest.mark.parametrize("form", KINDS)
def test_a_run_leaves_what_it_learned_of_each_kind(form, blank_exemplars, tmp_path):
    trainer = fit(KINDS[form](), blank_exemplars, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    written = json.loads((tmp_path / "instructions.json").read_text())
    assert written == load(tmp_path / "run.ckpt")
    assert list(written)[:6] == ["form", "backbone", "encoder_decoder", "step", "tasks", "learned"]
    report = Report.of(written)
    assert [task.name for task in report.tasks] == [f"task00{index}_label_train" for index in range(1, 5)]
    assert report.step == 6
    for task in report.tasks:
        assert len(task.tokens) == {"embedder": 3, "composition": 3}.get(form, 0)
        assert len(task.choices) == {"extractor": 2, "composition": 1}.get(form, 0)
        assert (task.weight is not None) == (form in ("weights", "composition"))
        assert [step for step, _ in task.weights] == ([] if task.weight is None else list(range(7)))
        for choice in task.choices:
            assert [step for step, *_ in choice.history] == list(range(7))
            assert choice.history[0][2] == pytest.approx(1 / 3, abs=1e-3)
            assert choice.history[-1][1:] == (choice.candidate, choice.probability)
            assert "Input:" in choice.exemplar
    assert len(report.points) == (0 if form == "weights" else 4)
    assert len(report.diversity) == (0 if form == "weights" else 7)
    assert (tmp_path / "instructions.html").read_text().count("<section>") == 4
    assert (tmp_path / "instructions.png").read_bytes()[:4] == b"\x89PNG"


def test_the_diversity_is_that_of_the_module(blank_exemplars, tmp_path):
    trainer = fit(KINDS["embedder"](), blank_exemplars, tmp_path)
    module = trainer.lightning_module
    written = json.loads((tmp_path / "instructions.json").read_text())["diversity"]
    learned = module.instruction.weight.detach().double().mean(dim=1)
    tokenizer = trainer.datamodule.tokenizer
    ids = [tokenizer(t.definitions[0], add_special_tokens=False).input_ids for t in module.data.split_tasks("train")]
    human = torch.stack([module.backbone.embedding(torch.tensor(row)).detach().double().mean(dim=0) for row in ids])
    # Six decimals are written: half of the last is 5e-7.
    assert written["learned"]["mean_cosine_distance"] == pytest.approx(slow_distance(learned), abs=2e-6)
    assert written["human"]["effective_rank"] == pytest.approx(slow_rank(human), abs=1e-4)
    plane = two_dimensional(learned, human)
    assert written["picture"]["learned"][0] == pytest.approx(plane.learned[0].tolist(), rel=1e-3)


@pytest.mark.parametrize("instruction", [None, FORMS["random_exemplar"].make()], ids=["none", "random"])
def test_nothing_learned_is_no_mistake(instruction, blank_exemplars, tmp_path, capsys):
    trainer = fit(instruction, blank_exemplars, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert (tmp_path / "instructions.json").exists() == (instruction is not None)
    assert not (tmp_path / "instructions.png").exists()
    code = main(["instructions", str(tmp_path / "run.ckpt")])
    output = capsys.readouterr()
    if instruction is None:
        assert code == 2
        assert "has no learned instruction" in output.err
    else:
        assert code == 0
        assert "its instructions depend on the" in output.out
        assert main(["instructions", str(tmp_path / "run.ckpt"), "--png", str(tmp_path / "x.png")]) == 2
        assert "nothing to draw" in capsys.readouterr().err


def test_the_history_is_bounded_and_even():
    callback = LearnedInstructions(moments=5)
    trainer = type("Trainer", (), {"global_step": 0, "loggers": []})()
    module = optimization(EmbedderDP(length=1))
    callback._vectors = lambda module: None  # type: ignore[method-assign]
    callback.moments = [{"step": 0, "learned": [], "diversity": None}]
    for step in range(1, 1001):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, step)
        assert len(callback.moments) <= 5
    assert [moment["step"] for moment in callback.moments] == [0, 256, 512, 768]


def test_a_run_that_says_how_long_it_is_keeps_so_many_moments(blank_exemplars, tmp_path):
    fit(KINDS["extractor"](), blank_exemplars, tmp_path, LearnedInstructions(moments=3), max_steps=8)
    history = json.loads((tmp_path / "instructions.json").read_text())["history"]
    assert [moment["step"] for moment in history] == [0, 4, 8]


@pytest.mark.parametrize("form", ["embedder", "composition"])
def test_a_resumed_run_has_the_same_history(form, blank_exemplars, tmp_path):
    def saved(name: str, step: int) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=step, save_top_k=-1)

    options: dict[str, Any] = {"max_steps": 9, "enable_checkpointing": True}
    whole, resumed = (LearnedInstructions(moments=4) for _ in range(2))
    fit(KINDS[form](), blank_exemplars, tmp_path, whole, saved("whole", 4), **options)
    start = tmp_path / "whole" / "step=4.ckpt"
    (tmp_path / "resumed").mkdir()
    fit(KINDS[form](), blank_exemplars, tmp_path, resumed, saved("resumed", 4), ckpt_path=start, **options)
    assert whole.state_dict() == resumed.state_dict()
    assert [moment["step"] for moment in whole.moments] == [0, 3, 6, 9]
    assert load(tmp_path / "whole" / "step=8.ckpt") == load(tmp_path / "resumed" / "step=8.ckpt")
    # A checkpoint between two moments ends with its own present.
    assert [step for step, *_ in Report.of(load(start)).diversity] == [0, 3, 4]


def test_a_fit_from_the_beginning_starts_a_new_history(blank_exemplars, tmp_path):
    callback = LearnedInstructions()
    for _ in range(2):
        fit(KINDS["extractor"](), blank_exemplars, tmp_path, callback, max_steps=3)
        assert [moment["step"] for moment in callback.moments] == [0, 1, 2, 3]


def test_loggers_get_numbers_and_tensorboard_the_rest(blank_exemplars, tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")]
    fit(KINDS["embedder"](), blank_exemplars, tmp_path, logger=loggers, max_steps=3)
    (folder,) = (tmp_path / "board" / "lightning_logs").iterdir()
    board = EventAccumulator(str(folder)).Reload()
    written = json.loads((folder / "instructions.json").read_text())
    curve = board.Scalars("instructions/effective_rank")
    assert [(event.step, pytest.approx(event.value)) for event in curve] == [
        (moment["step"], moment["diversity"]["learned"]["effective_rank"]) for moment in written["history"]
    ]
    assert board.Images("instructions")
    (text,) = board.Tensors("instructions/text_summary")
    assert b"task001&#95;label&#95;train" in text.tensor_proto.string_val[0]
    header = (tmp_path / "table" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "instructions/mean_cosine_distance" in header.split(",")


def test_two_processes_write_once_and_alike(blank_exemplars, tmp_path):
    written = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        root = tmp_path / str(devices)
        fit(KINDS["extractor"](), blank_exemplars, root, devices=devices, strategy=strategy, max_steps=3)
        written.append(json.loads((root / "instructions.json").read_text()))
    assert written[0]["history"][0] == written[1]["history"][0]
    assert [moment["step"] for moment in written[1]["history"]] == [0, 1, 2, 3]


HOSTILE = "Input: <script>alert('x')</script> [bold]\n Output: |a|*b*_c_&amp;"


def hostile() -> dict[str, Any]:
    """What a checkpoint might say, with text that means something to a terminal, a browser or a table."""
    slot = {"candidate": 1, "probability": 0.75, "exemplar": HOSTILE, "unknown": None}
    learned = [
        {"task": "<b>one</b>", "slots": [slot], "nearest_tokens": ["<s>", "▁a"], "cosine": [0.5, -0.1]},
        {"task": "two", "parts": [{"form": "TaskWeights", "weight": 2.0}, {"form": "?", "parts": [{"weight": 0.5}]}]},
    ]
    history = [
        {"step": 0, "learned": [{"slots": [{"candidate": 0, "probability": 0.5}]}, {}], "diversity": None},
        {"step": 3, "learned": [], "diversity": None},
    ]
    names = [entry["task"] for entry in learned]
    return {"form": "<i>", "backbone": "<u>", "tasks": names, "learned": learned, "step": 7, "history": history}


class Tags(HTMLParser):
    """The tags and the text of a page, which must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_from_data_is_shown_as_it_is():
    report = Report.of(hostile())
    tags = Tags(page(report))
    assert not tags.seen & {"script", "i", "u", "s"}
    for text in (HOSTILE, "<i>", "<u>", "<s>"):
        assert text in tags.text
    console = Console(width=200, record=True, file=(sink := open("/dev/null", "w")))  # noqa: SIM115
    show(report, console)
    sink.close()
    printed = console.export_text()
    assert "<script>alert('x')</script> [bold] Output: |a|*b*_c_&amp;" in printed
    assert "0 -> 1" in printed
    assert "0.50 -> 0.75" in printed
    text = markdown(report)
    assert "<script>" not in text
    assert {line.count("|") for line in text.splitlines()[2:]} == {6}
    assert report.tasks[1].weight == 1.0
    assert report.tasks[0].choices[0].changes == [(0, 0, 0.5), (7, 1, 0.75)]
    assert picture(report) is not None


def test_a_checkpoint_without_the_callback_shows_the_present(tmp_path, capsys):
    data = {name: value for name, value in hostile().items() if name not in ("step", "history")}
    torch.save({"instruction": data}, tmp_path / "old.ckpt")
    assert main(["instructions", str(tmp_path / "old.ckpt"), "--html", str(tmp_path / "old.html")]) == 0
    assert "probability <b>0.750</b>" in (tmp_path / "old.html").read_text()
    assert main(["instructions", str(tmp_path / "old.ckpt")]) == 0
    assert "0.75" in capsys.readouterr().out


def test_the_command_shows_and_writes(blank_exemplars, tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "run.ckpt")
    fit(KINDS["composition"](), blank_exemplars, tmp_path).save_checkpoint(path)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["instructions", path]) == 0
    shown = capsys.readouterr().out
    for word in ("task004_label_train", "effective rank", "human definitions", "weight", "0.33"):
        assert word in shown
    assert main(["instructions", path, "--json", "-"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert everything == json.loads((tmp_path / "instructions.json").read_text())
    files = [f"--json={tmp_path}/a.json", f"--html={tmp_path}/a.html", f"--png={tmp_path}/a.png"]
    assert main(["instructions", path, *files]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "instructions.json").read_bytes()
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "instructions.html").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "instructions.png").read_bytes()

    assert main(["instructions", path, "--tasks", "*1_*,task003_label_train", "--json", "-"]) == 0
    some = json.loads(capsys.readouterr().out)
    assert some["tasks"] == ["task001_label_train", "task003_label_train"]
    assert [len(moment["learned"]) for moment in some["history"]] == [2] * 7
    assert some["learned"] == [everything["learned"][row] for row in (0, 2)]
    assert some["diversity"]["picture"]["human"] == [everything["diversity"]["picture"]["human"][row] for row in (0, 2)]
    assert some["diversity"]["learned"] == everything["diversity"]["learned"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.ckpt"], "There is no file nowhere.ckpt"),
        (["text.ckpt"], "Cannot read text.ckpt as a checkpoint"),
        (["other.ckpt"], "other.ckpt has no learned instruction"),
        (["list.ckpt"], "list.ckpt is not a checkpoint"),
        (["code.ckpt"], "Cannot read code.ckpt as a checkpoint (Weights only load failed)"),
        (["good.ckpt", "--tasks=three"], "there is no `three` among the 2 train tasks; names that come near are `two`"),
        (["good.ckpt", "--html=nowhere/page.html"], "There is no folder nowhere to write page.html to"),
        (["good.ckpt", "--png=."], ". is a folder: give the name of a file"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, capsys):
    Path("text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, "other.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"instruction": Path("anything that is not plain data")}, "code.ckpt")
    torch.save({"instruction": hostile()}, "good.ckpt")
    assert main(["instructions", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diopt: error: ")
    assert message in line


def test_too_few_moments_are_refused():
    with pytest.raises(ConfigurationError, match="`moments` must be 2 or more"):
        LearnedInstructions(moments=1)


def test_a_selection_keeps_what_is_missing_missing():
    assert select(hostile(), "two")["history"][1]["learned"] == []


HOSTILE_PIECES = ["\x1b[31m", "\x9b2J", "\u202e", "\u2028", "\x00", "\r", "\n", "\t", "[bold]x[/x]", "[/x]", "<script>"]
HOSTILE_PIECES += [
    "&amp;",
    "|",
    "*_`",
    ",=1+1",
    '"',
    "'",
    "../",
    "/abs",
    "..",
    ".",
    "\\",
    "%2F",
    "\ud800",
    "\U000e0001",
    "é",
    "a" * 300,
]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(HOSTILE_PIECES), st.text()), max_size=4).map("".join)


def saying(name: str, form: str, text: str) -> dict[str, Any]:
    slot = {"candidate": 1, "probability": 0.75, "exemplar": text, "input": text}
    learned = [{"task": name, "slots": [slot], "nearest_tokens": [text], "cosine": [0.5]}]
    return {"form": form, "backbone": text, "tasks": [name], "learned": learned, "step": 7}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(name=ANY_TEXT, other=ANY_TEXT, text=ANY_TEXT)
def test_any_text_is_escaped_for_where_it_goes(name, other, text):
    data = saying(name, other, text)
    report = Report.of(data)
    # The terminal: nothing that it obeys, and no markup.
    cells = [str(cell) for column in tasks_table(report).columns for cell in column.cells]
    assert cells[0] == printable(name)
    show(report, Console(file=(terminal := io.StringIO()), width=500, force_terminal=True, color_system=None))
    Console(file=terminal, width=500).print(Text(printable(other)))
    assert all(c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" for c in terminal.getvalue())
    # Markdown, as TensorBoard reads it: as many cells as columns.
    table = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {5}
    assert html.unescape(table[2].split("|")[1].strip()) == printable(name).strip()
    # HTML: no tag of its own, and the text is there.
    tags = Tags(page(report))
    assert tags.seen == Tags(page(Report.of(saying("a", "b", "c")))).seen
    assert printable(name, keep="\n\t") in tags.text
    page(report).encode()
    # JSON, in a file and as a line of one: the same data, for whoever splits lines in whatever way.
    for indent in (1, None):
        written = as_json(data, indent)
        assert json.loads(written) == data
        assert written.encode()
    assert len(as_json(data, None).splitlines()) == 1
    # CSV, by Lightning's logger, of what names of tasks may have.
    metric = f"dev/rouge/{name}".replace("\ud800", "")
    with tempfile.TemporaryDirectory() as root:
        logger = CSVLogger(root)
        logger.log_metrics({metric: 1.0, "other": 2.0}, step=0)
        logger.save()
        with open(Path(logger.log_dir) / "metrics.csv", newline="", encoding="utf-8") as file:
            assert [row[metric] for row in csv.DictReader(file)] == ["1.0"]
    # Names of files: within the folder, and no two alike.
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / file_name(name)
        path.mkdir()
        assert [child.name for child in Path(root).iterdir()] == [path.name]
    assert (file_name(name) == file_name(other)) == (name == other)


def test_names_of_others_neither_leave_the_folder_nor_end_a_run(tmp_path, capsys):
    names = ["../../x", "/abs/x", "..", "a" * 300, "[/x]"]
    export_adapter({name: torch.zeros(1, 2) for name in names}, tmp_path / "in" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert sorted(path.name for path in (tmp_path / "in" / "out").iterdir()) == sorted(map(file_name, names))
    Results()._show("title", {"[bold]x": "1"}, Path("[/x]\x1b"))
    assert main(["instructions", "\x1b[31m\x9b\u202enowhere.ckpt"]) == 2
    said = capsys.readouterr()
    assert "Results are in [/x]\\x1b" in said.out
    assert "[bold]x" in said.out
    assert "\\x1b[31m\\x9b\\u202enowhere.ckpt" in said.err
    assert (said.out + said.err).replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["../../x", "/abs/x", "x\x00", "\ud800"])
def test_a_task_that_no_file_can_have_is_refused(name, layout, tmp_path):
    slot = ChosenExemplar(0, 1.0, input="oak", output="fox")
    with pytest.raises(ConfigurationError, match="which no file can have"):
        export_text(layout(), tmp_path / "out", [Description(name, slots=[slot])], "ExtractorDP")
    with pytest.raises(ConfigurationError, match="which no tensor in a file can have"):
        export_embeddings({"__metadata__": torch.zeros(1, 2)}, tmp_path / "out", "EmbedderDP", "t5")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("decompose", [effective_rank, lambda vectors: two_dimensional(vectors, torch.ones(1, 2))])
def test_vectors_that_are_not_finite_end_in_one_sentence(decompose, value):
    with pytest.raises(TrainingError, match="Vectors of instructions are not finite"):
        decompose(torch.tensor([[1.0, value]]))
