"""The command line: every shipped configuration, the help, whole small runs, and users' mistakes."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import Module

from diopt_lightning import backbones, bilevel, instructions
from diopt_lightning.backbones import Backbone
from diopt_lightning.bilevel import HypergradientEstimator, Product
from diopt_lightning.cli import DioptCLI, main, run
from diopt_lightning.data import BlankExemplars
from diopt_lightning.instructions import Instruction
from tests.conftest import TINY_T5
from tests.helpers import concrete_classes

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CLASSES = [
    ("model", "diopt_lightning.InstructionOptimization"),
    ("model", "diopt_lightning.InstructionTuning"),
    ("data", "diopt_lightning.data.NaturalInstructionsDataModule"),
    ("data", "diopt_lightning.data.BlankExemplarsDataModule"),
]
PARTS = [
    *(("backbone", f"diopt_lightning.backbones.{each.__name__}") for each in concrete_classes(backbones, Backbone)),
    *(
        ("instruction", f"diopt_lightning.instructions.{each.__name__}")
        for each in concrete_classes(instructions, Instruction)
        if each.__init__ is not Module.__init__  # it has options
    ),
    *(
        ("hypergradient", f"diopt_lightning.bilevel.{each.__name__}")
        for each in concrete_classes(bilevel, HypergradientEstimator)
    ),
]
PRODUCTS = [product.__name__ for product in concrete_classes(bilevel, Product)]


def parse(*arguments: str) -> Any:
    """The parsed configuration of a command, without running it."""
    cli = object.__new__(DioptCLI)
    with pytest.MonkeyPatch.context() as patch:
        captured: dict[str, Any] = {}
        patch.setattr(DioptCLI, "before_instantiate_classes", lambda self: captured.update(config=self.config))
        patch.setattr(DioptCLI, "instantiate_classes", lambda self: None)
        patch.setattr(DioptCLI, "_run_subcommand", lambda self, subcommand: None)
        run(list(arguments))
    del cli
    return captured["config"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_is_valid(path):
    config = parse("fit", "--config", str(path))
    written = yaml.safe_load(path.read_text())
    assert config.fit.model.class_path == written["model"]["class_path"]


def test_an_optimizer_keeps_nothing_of_the_default_one():
    plain = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    del plain["model"]["init_args"]["inner_optimizer"]["init_args"]["weight_decay"]
    Path("plain.yaml").write_text(yaml.safe_dump(plain))
    config = parse("fit", "--config", "plain.yaml", "--model.inner_optimizer.lr=0.3")
    optimizer = config.fit.model.init_args.inner_optimizer
    assert (optimizer.class_path, optimizer.init_args.lr, optimizer.init_args.weight_decay) == (
        "torch.optim.Adam",
        0.3,
        0,
    )


def help_of(*arguments: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
        run(list(arguments))
    assert stop.value.code == 0
    return output.getvalue()


@pytest.mark.parametrize(("kind", "class_path"), CLASSES)
def test_every_argument_is_described(kind, class_path):
    check_help(help_of("fit", f"--{kind}.help={class_path}"), f"--{kind}.")


@pytest.mark.parametrize(("part", "class_path"), PARTS)
def test_every_argument_of_a_part_is_described(part, class_path):
    model = "diopt_lightning.InstructionOptimization"
    check_help(help_of("fit", f"--model={model}", f"--model.{part}.help={class_path}"), f"--{part}.")


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_argument_of_a_product_is_described(name):
    model = "diopt_lightning.InstructionOptimization"
    estimator = "diopt_lightning.bilevel.Chebyshev"
    chosen = [f"--model={model}", f"--model.hypergradient={estimator}"]
    check_help(help_of("fit", *chosen, f"--model.hypergradient.product.help=diopt_lightning.bilevel.{name}"), "--")


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_estimator_a_product_and_a_spectrum_are_chosen_on_the_command_line(name):
    config = parse(
        "fit",
        "--config",
        str(ROOT / "configs" / "demo.yaml"),
        "--model.hypergradient=diopt_lightning.bilevel.Chebyshev",
        "--model.hypergradient.products=7",
        f"--model.hypergradient.product=diopt_lightning.bilevel.{name}",
        "--model.hypergradient.product.fraction=0.5",
        "--model.hypergradient.spectrum=diopt_lightning.bilevel.Spectrum",
        "--model.hypergradient.spectrum.refresh_every=10",
        "--model.micro_batches=2",
    )
    estimator = config.fit.model.init_args.hypergradient
    assert estimator.class_path == "diopt_lightning.bilevel.Chebyshev"
    assert estimator.init_args.products == 7
    assert estimator.init_args.product.init_args.fraction == 0.5
    assert estimator.init_args.spectrum.init_args.refresh_every == 10


def test_a_composition_with_nested_parts_is_written_in_yaml():
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    forms = "diopt_lightning.instructions"
    annealed = {"start": 2.0, "end": 0.5, "steps": 100}
    relaxation = {"class_path": f"{forms}.GumbelStraightThrough", "init_args": {"temperature": annealed}}
    encoding = {"class_path": f"{forms}.Transformer", "init_args": {"heads": 2}}
    conversion = {"class_path": f"{forms}.Linear", "init_args": {"length": 4, "encoding": encoding}}
    config["model"]["init_args"]["instruction"] = {
        "class_path": f"{forms}.Composition",
        "init_args": {
            "parts": [
                {"class_path": f"{forms}.EmbedderIC", "init_args": {"conversion": conversion}},
                {"class_path": f"{forms}.ExtractorIC", "init_args": {"candidates": 3, "relaxation": relaxation}},
                {"class_path": f"{forms}.TaskWeights"},
            ]
        },
    }
    Path("composed.yaml").write_text(yaml.safe_dump(config))
    parsed = parse("fit", "--config", "composed.yaml").fit.model.init_args.instruction
    embedder, extractor, weights = parsed.init_args.parts
    assert embedder.init_args.conversion.init_args.encoding.init_args.heads == 2
    assert extractor.init_args.relaxation.init_args.temperature.end == 0.5  # a plain dataclass
    assert weights.class_path == f"{forms}.TaskWeights"


def check_help(text: str, prefix: str) -> None:
    """Every option is followed by words of its own, beside its type and default."""
    options: dict[str, str] = {}
    current = None
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("--"):
            current = stripped.split()[0]
            options[current] = " ".join(stripped.split()[1:])
        elif current is not None:
            options[current] += " " + stripped
    described = {name: said for name, said in options.items() if name.startswith(prefix) and ".help" not in name}
    assert described
    for name, said in described.items():
        words = said.split("(type:")[0].split("(required")[0]
        assert sum(word.strip(".,").isalpha() for word in words.split()[1:]) >= 3, (name, said)


def small_run(root: Path, config: str = "demo.yaml") -> list[str]:
    """Arguments that make the demo small."""
    return [
        "--config",
        str(ROOT / "configs" / config),
        f"--data.root={root / 'data'}",
        "--data.tasks={exemplars: 3, train_tasks: 4, validation_tasks: 2, dev_tasks: 2, test_tasks: 2, instances: 8,"
        " labels: 4}",
        "--data.batch_size=4",
        "--data.outer_batch_size=4",
        "--model.instruction.candidates=3",
        f"--model.backbone.config={json.dumps(TINY_T5)}",
        "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={root}",
    ]


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_a_small_demo_leaves_its_results(tmp_path, capfd):
    assert main(["fit", *small_run(tmp_path)]) == 0
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {
        "losses.csv",
        "losses.png",
        "instructions.json",
        "instructions.html",
        "instructions.png",
        "metrics.json",
        "predictions.jsonl",
        "config.yaml",
    } <= names
    assert len((folder / "losses.csv").read_text().splitlines()) == 1 + 16
    instructions = json.loads((folder / "instructions.json").read_text())
    learned = instructions["learned"]
    assert [row["task"] for row in learned] == instructions["tasks"] == [f"task00{i}_label_train" for i in range(1, 5)]
    assert all(0 <= row["slots"][0]["probability"] <= 1 for row in learned)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"test/loss", "test/rougeL", "test/exact_match", "test/rougeL/category/Label Recall"} <= metrics.keys()
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 16
    assert {"id", "prediction", "references"} <= predictions[0].keys()
    assert f"Results are in {folder}" in capfd.readouterr().out


def test_a_small_baseline_leaves_the_same_results(tmp_path):
    assert main(["fit", *small_run(tmp_path, "demo_random_exemplars.yaml")]) == 0
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    header, *rows = (folder / "losses.csv").read_text().splitlines()
    assert header == "step,inner_loss,outer_loss"
    assert len(rows) == 16
    assert all(row.endswith(",") for row in rows)  # there is no outer level
    assert "test/exact_match" in json.loads((folder / "metrics.json").read_text())
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 16


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_resumed_in_mid_epoch_is_bitwise_the_uninterrupted_one_and_can_be_tested(tmp_path, workers):
    saved = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "every_n_train_steps": 11,
            "save_top_k": -1,
            "dirpath": f"{tmp_path}/saved",
            "filename": "{step}",
        },
    }
    usual = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    arguments = [*small_run(tmp_path), f"--data.num_workers={workers}", "--test_after_fit=false"]
    arguments += ["--trainer.max_epochs=4", "--trainer.limit_val_batches=1"]
    assert main(["fit", *arguments, f"--trainer.callbacks={json.dumps([saved, usual])}"]) == 0
    assert main(["fit", *arguments, "--trainer.callbacks=[]", f"--ckpt_path={tmp_path}/saved/step=11.ckpt"]) == 0
    whole, resumed = (checkpoint(tmp_path, version) for version in (0, 1))
    assert whole["bilevel"] == resumed["bilevel"]
    assert whole["bilevel"]["outer_steps_taken"] == 32
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    torch.testing.assert_close(whole["state_dict"], resumed["state_dict"], rtol=0, atol=0)
    losses = [(tmp_path / "lightning_logs" / f"version_{v}" / "losses.csv").read_text() for v in (0, 1)]
    assert losses[0] == losses[1]

    folder = tmp_path / "lightning_logs" / "version_1"
    path = folder / "checkpoints" / "epoch=3-step=32.ckpt"
    test = ["--config", str(folder / "config.yaml"), f"--ckpt_path={path}"]
    assert main(["test", *test]) == 0
    assert (tmp_path / "lightning_logs" / "version_2" / "predictions.jsonl").exists()


def checkpoint(root: Path, version: int) -> dict[str, Any]:
    path = root / "lightning_logs" / f"version_{version}" / "checkpoints" / "epoch=3-step=32.ckpt"
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root=nowhere", "--data=diopt_lightning.data.NaturalInstructionsDataModule"], "no folder nowhere"),
        (["--data.batch_size=0"], "`data.batch_size` must be 1 or more, got 0"),
        (["--model.inner_steps=0"], "`inner_steps` must be 1 or more, got 0"),
        (["--model.hypergradient.step_size=-1"], "`step_size` must be positive, got -1.0"),
        (["--model.instruction.slots=4"], "An extractor chooses 4 exemplars (`slots`) among 3"),
        (
            ["--model.instruction.slots=4", "--model.instruction.candidates=4"],
            "`task001_label_train` has 3 candidate exemplars for 4 `slots`",
        ),
        (["--model.instruction.candidate_length=2000"], "the learned instruction alone takes 2008"),
        (["--model.backbone.config={d_model: 8}"], "needs a `model_type`"),
        (["--data.validation_tasks=0"], "There are no validation tasks"),
        (["--model.instruction=diopt_lightning.instructions.RandomExemplar"], "RandomExemplar has nothing to learn"),
    ],
)
def test_a_mistake_ends_with_one_line_before_training(tmp_path, capfd, arguments, message):
    if "validation" in message:
        blank = BlankExemplars(train_tasks=4, validation_tasks=1, dev_tasks=0, test_tasks=1, instances=2)
        blank.write(tmp_path / "data")
        (tmp_path / "data" / "splits" / "default" / "validation_tasks.txt").unlink()
        arguments = [f"--data.root={tmp_path}/data", f"--data.tokenizer={tmp_path}/data/tokenizer", *arguments]
        arguments = ["--data=diopt_lightning.data.NaturalInstructionsDataModule", *arguments, "--data.dev_tasks=0"]
        given = [a for a in small_run(tmp_path) if not a.startswith("--data.")]
    elif "NaturalInstructions" in "".join(arguments):
        arguments = [*reversed(arguments), "--data.tokenizer=none"]
        given = [a for a in small_run(tmp_path) if not a.startswith("--data.")]
    else:
        given = small_run(tmp_path)
    assert main(["fit", *given, "--trainer.callbacks=[]", *arguments]) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("diopt: error:")]
    assert message in line


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
def test_the_options_of_both_levels_and_of_the_test_are_written_in_a_configuration(tmp_path):
    options = {
        "model.inner_scheduler": {"class_path": "LinearWithWarmup", "init_args": {"warmup_steps": 1}},
        "model.outer_scheduler": "diopt_lightning.modules.LinearWithWarmup",
        "model.inner_groups": [{"vectors": True, "options": {"weight_decay": 0.0}}],
        "model.outer_groups": [{"names": ["instruction.*"], "options": {"lr": 0.2}}],
        "model.outer_batches": 2,
        "model.label_smoothing": 0.1,
        "model.num_beams": 2,
        "data.test_prompt": {"plain": {"definition": False, "positive_examples": 0}, "shown": {"positive_examples": 1}},
        "data.validation_tasks": 2,
        "data.dev_tasks": 1,
        "data.batch_size": 8,
        "trainer.max_steps": 2,
    }
    BlankExemplars(train_tasks=4, validation_tasks=2, dev_tasks=2, test_tasks=2, instances=8, labels=4).write(tmp_path)
    given = [a for a in small_run(tmp_path) if not a.startswith(("--data.", "--trainer.max_epochs"))]
    given += [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    data = ["--data=diopt_lightning.data.NaturalInstructionsDataModule", f"--data.root={tmp_path}"]
    data += [f"--data.tokenizer={tmp_path}/tokenizer"]
    assert main(["fit", *given[:2], *data, *given[2:]]) == 0
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"test/plain/rougeL", "test/shown/rougeL", "test/shown/exact_match/category/Label Recall"} <= metrics.keys()
    (path,) = folder.rglob("*.ckpt")
    inner, outer = torch.load(path, weights_only=True)["optimizer_states"]
    assert [group["weight_decay"] for group in inner["param_groups"]] == [0.01, 0.0]
    assert [group["initial_lr"] for group in outer["param_groups"]] == [0.2]
    assert [group["lr"] for group in inner["param_groups"] + outer["param_groups"]] == [0.0] * 3  # at the run's end
