"""Two processes against one with the double batch, on targets of unequal lengths."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from diopt_lightning import InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import RandomCausal
from diopt_lightning.callbacks import Results
from diopt_lightning.data import NaturalInstructionsDataModule, PromptFormat
from diopt_lightning.data.synthetic import WORDS
from diopt_lightning.instructions import CandidatePool, EmbedderDP, ExtractorDP, Instruction, Soft
from tests.conftest import task_document
from tests.estimators import Claim, claiming
from tests.helpers import quiet_trainer
from tests.test_backbones import FAMILIES
from tests.tolerances import Error

# What warns of a system that a handful of products does not solve is no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
ESTIMATORS = claiming(Claim.PROCESSES)
# Both without random draws, which are others on other processes.
FORMS: dict[str, Callable[[], Instruction]] = {
    "embedder": lambda: EmbedderDP(length=2),
    "extractor": lambda: ExtractorDP(1, 3, 32, CandidatePool(instances=False), Soft()),
}
PHI = "instruction.weight"
MODELS = {
    "32-true": FAMILIES["llama"] | {"num_hidden_layers": 1},
    # In float64 throughout, where Llama's norms would compute in float32.
    "64-true": FAMILIES["gpt2"] | {"n_layer": 1, "n_positions": 2048},
}


@pytest.fixture
def root(layout) -> Path:
    """Tasks whose targets have one to five words."""

    def instances(name: str) -> list[dict[str, Any]]:
        return [
            {"id": f"{name}-{i}", "input": " ".join(WORDS[i : i + 3]), "output": [" ".join(WORDS[i : i + 1 + i % 5])]}
            for i in range(12)
        ]

    names = [f"task{i:03d}" for i in (*range(8), 100, 101)]
    return layout({name: task_document(name, Instances=instances(name)) for name in names})


@pytest.fixture
def uneven(root) -> Path:
    """The same, with 5 to 12 instances of each task: 17 test instances, and odd numbers of others."""
    for path in (root / "tasks").glob("*[1357].json"):
        task = json.loads(path.read_text())
        path.write_text(json.dumps(task | {"Instances": task["Instances"][: 5 + int(path.stem[-1]) // 2]}))
    return root


class EqualOnAllProcesses(pl.Callback):
    """Fails the run if anything learned is not bitwise equal on all processes after any step; keeps what was logged."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            gathered = pl_module.all_gather(parameter.detach())
            assert torch.equal(gathered[0], gathered[1]), name


def bilevel(estimator: str, form: str, precision: str, **options: Any) -> InstructionOptimization:
    """A module that clips and accumulates at both levels."""
    return InstructionOptimization(
        RandomCausal(dict(MODELS[precision])),
        FORMS[form](),
        ESTIMATORS[estimator](),
        inner_steps=1,
        inner_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-4),
        outer_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3, eps=1e-4),
        inner_gradient_clip=0.5,
        outer_gradient_clip=0.01,
        inner_accumulation=2,
        outer_accumulation=2,
        **options,
    )


def baseline() -> InstructionTuning:
    """A module that learns the same by backpropagation; the trainer clips and accumulates."""
    return InstructionTuning(
        RandomCausal(dict(MODELS["64-true"])),
        EmbedderDP(length=2),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-4),
    )


def trained(
    module: pl.LightningModule, precision: str, rounds: int, root: Path, processes: int, **options: Any
) -> dict[str, Any]:
    """Train, and return the checkpoint at the end, with the parameters at the start in it."""
    torch.manual_seed(0)
    data = NaturalInstructionsDataModule(
        str(root),
        str(root / "tokenizer"),
        dev_tasks=0,
        validation_tasks=3,
        validation_prompt=PromptFormat(positive_examples=0),
        batch_size=4 // processes,
        max_source_length=256,
        cache_dir=str(root / "cache"),
    )
    several = {"devices": 2, "strategy": "ddp_fork", "callbacks": [EqualOnAllProcesses()]} if processes == 2 else {}
    trainer = quiet_trainer(max_steps=rounds, precision=precision, **several, **options)
    path = root / f"{processes}.ckpt"

    class Save(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.start = {name: value.detach().clone() for name, value in pl_module.named_parameters()}

        def on_save_checkpoint(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
        ) -> None:
            checkpoint["start"] = self.start

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(path)

    trainer.callbacks.append(Save())
    trainer.fit(module, data)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def assert_equal(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    """Check what two runs have learned."""
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)


def check(estimator: str, form: str, precision: str, rounds: int, root: Path, **options: Any) -> None:
    make = partial(bilevel, estimator, form, precision, **options)
    one, two = (trained(make(), precision, rounds, root, number) for number in (1, 2))
    assert one["bilevel"]["outer_steps_taken"] == two["bilevel"]["outer_steps_taken"] == rounds
    assert_equal(one, two, {"32-true": 1e-5, "64-true": 1e-10}[precision])


# All of them do so over twenty rounds below, and with a small network in tests/test_bilevel_module.py.
@pytest.mark.parametrize("estimator", ["neumann_step_size", "chebyshev", "unrolled", "natural_low_rank"])
def test_two_processes_equal_one_with_the_double_batch(estimator, root):
    check(estimator, "embedder", "64-true", 3, root)


def test_several_outer_batches_and_uneven_tasks_do_so_too(uneven):
    check("chebyshev", "embedder", "64-true", 3, uneven, outer_batches=3)


class Noisy(InstructionTuning):
    """Says something else to each instance, though it is not trained."""

    def configure_model(self) -> None:
        super().configure_model()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.backbone.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def run_and_test(root: Path, processes: int) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and files of predictions of a test with two prompts."""
    prompts = {"none": PromptFormat(False, False, 0), "examples": PromptFormat(False, True, 2)}
    data = NaturalInstructionsDataModule(
        str(root), str(root / "tokenizer"), test_prompt=prompts, batch_size=4, cache_dir=str(root / "cache")
    )
    several = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    folder = root / f"{processes}"
    trainer = quiet_trainer(precision="64-true", default_root_dir=folder, callbacks=[Results(table=False)], **several)
    trainer.test(Noisy(RandomCausal(dict(MODELS["64-true"])), max_new_tokens=3), data, verbose=False)
    files = {path.name: path.read_text() for path in folder.glob("predictions*.jsonl")}
    return json.loads((folder / "metrics.json").read_text()), files


def test_several_prompts_on_two_processes_are_scored_as_on_one(uneven):
    (scores, files), (expected, expected_files) = (run_and_test(uneven, number) for number in (2, 1))
    assert files == expected_files
    assert {name: text.count("\n") for name, text in files.items()} == {
        "predictions_none.jsonl": 17,
        "predictions_examples.jsonl": 17,
    }
    assert len(set(files["predictions_none.jsonl"].splitlines())) == 17
    assert scores == pytest.approx(expected, abs=1e-5)  # metrics are float32
    assert scores["test/none/loss"] != scores["test/examples/loss"]


def test_the_baseline_on_two_processes_equals_one_with_the_double_batch(root):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "log_every_n_steps": 1}
    one, two = (trained(baseline(), "64-true", 5, root, number, **options) for number in (1, 2))
    assert one["global_step"] == two["global_step"] == 5
    assert_equal(one, two, 1e-10)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_two_processes_in_bfloat16_go_the_same_way_as_one(precision, root):
    make = partial(bilevel, "chebyshev", "embedder")
    one, two = (trained(make("32-true"), precision, 3, root, number) for number in (1, 2))
    moved = [run["state_dict"][PHI] - run["start"][PHI] for run in (one, two)]
    assert all(each.dtype == torch.float32 and each.abs().max() > 1e-3 for each in moved)
    assert Error(1 - F.cosine_similarity(*(each.flatten() for each in moved), dim=0)) < 0.001


@pytest.mark.slow
@pytest.mark.parametrize("precision", MODELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_they_do_so_over_twenty_rounds(estimator, form, precision, root):
    torch.set_num_threads(1)
    check(estimator, form, precision, 20, root)
