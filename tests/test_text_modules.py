"""The paper's module and the baselines on small tasks, on one process and on two."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rouge_score.rouge_scorer import RougeScorer

from diopt_lightning import ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.bilevel import Chebyshev, Neumann
from diopt_lightning.callbacks import Results
from diopt_lightning.data import BlankExemplarsDataModule, PromptFormat
from diopt_lightning.data.collate import Batch
from diopt_lightning.instructions import (
    CandidatePool,
    EmbedderDP,
    EmbedderIC,
    ExtractorDP,
    Linear,
    TaskWeights,
)
from diopt_lightning.modules.predictions import Prediction, predictions_of
from tests.conftest import TINY_T5
from tests.forms import FORMS, LEARNABLE
from tests.helpers import quiet_trainer
from tests.runs import data, moved, optimization

POOL = CandidatePool(instances=False)


def optimization_to_pickle() -> InstructionOptimization:
    """A module that another interpreter can be given, with the default optimizers."""
    return InstructionOptimization(RandomSeq2Seq(dict(TINY_T5)), EmbedderDP(length=3), max_new_tokens=3)


@pytest.mark.parametrize("form", [*FORMS, "none"])
def test_baselines_learn_what_they_have(form, blank_exemplars, tmp_path):
    instruction = FORMS[form].make() if form in FORMS else None
    module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), instruction, max_new_tokens=3)
    distances = moved(module, blank_exemplars, tmp_path)
    assert distances["backbone"] > 0
    assert (distances["instruction"] > 0) == (form in LEARNABLE)


def test_the_instruction_of_a_baseline_has_a_learning_rate_of_its_own(blank_exemplars, tmp_path):
    module = InstructionTuning(
        RandomSeq2Seq(dict(TINY_T5)),
        EmbedderDP(length=2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        instruction_lr=0.5,
    )
    distances = moved(module, blank_exemplars, tmp_path)
    assert distances["backbone"] == 0
    assert distances["instruction"] > 0


def test_dev_and_test_tasks_are_evaluated_with_human_written_instructions(blank_exemplars, tmp_path):
    module, tasks = optimization(EmbedderDP(length=2)), data(blank_exemplars, tmp_path)
    trainer = quiet_trainer(max_steps=8, callbacks=[Results(table=False)], default_root_dir=tmp_path)
    trainer.fit(module, tasks)
    assert {"dev/loss", "dev/rougeL", "dev/exact_match"} <= trainer.callback_metrics.keys()
    trainer.test(module, tasks, verbose=False)
    losses, tokens = 0.0, 0
    with torch.no_grad():  # the mean over all tokens, and nothing of what was learned about instructions
        for batch in tasks.test_dataloader():
            number = int((batch.labels != -100).sum())
            losses += module.backbone.loss(batch).item() * number
            tokens += number
    assert trainer.callback_metrics["test/loss"].item() == pytest.approx(losses / tokens, rel=1e-5)
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    ids = sorted(row["id"] for row in written)
    assert ids == sorted(instance.id for task in tasks.split_tasks("test") for instance in task.instances)
    (tmp_path / "predictions.jsonl").unlink()
    trainer.predict(module, tasks)
    again = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert again == written


def test_both_official_evaluations_read_the_predictions_and_agree_with_the_scores(blank_exemplars, tmp_path):
    module, tasks = Echo(RandomSeq2Seq(dict(TINY_T5)), max_new_tokens=3), data(blank_exemplars, tmp_path)
    quiet_trainer(callbacks=[Results(table=False)], default_root_dir=tmp_path).test(module, tasks, verbose=False)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "metrics.json").read_text())
    instances = {row.id: row for task in tasks.split_tasks("test") for row in task.instances}
    scorer, scores = RougeScorer(["rouge1", "rougeL"], use_stemmer=True), defaultdict(list)
    for line in lines:
        assert line["Instance"] == {"id": line["id"], "output": list(instances[line["id"]].outputs)}
        assert line["Prediction"] == line["prediction"]
        for group in ("", f"_for_{line['Task']}", "_for_label_recall"):
            for metric, score in scorer.score(line["Instance"]["output"][0], line["Prediction"]).items():
                scores[f"{metric}{group}"].append(100 * score.fmeasure)
            scores[f"exact_match{group}"].append(100.0 * (line["Prediction"] in line["Instance"]["output"]))
        scores["gen_len"].append(line["generated_tokens"])
    expected = {name: sum(values) / len(values) for name, values in scores.items()}
    assert {name: value for name, value in found.items() if "/" not in name} == pytest.approx(expected)
    assert found["gen_len"] == found["test/gen_len"]
    outputs, batch = torch.tensor([[0, 5, 1, 0], [0, 5, 6, 1]]), next(iter(tasks.test_dataloader()))
    rows = predictions_of(outputs, tasks.tokenizer, Batch(*(column[:2] for column in batch)), tasks.tasks)
    assert [row["generated_tokens"] for row in rows] == [2, 3]  # padding, with which T5 begins, is none
    assert found["exact_match"] == found["test/exact_match"] == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: optimization(ExtractorDP(1, 3, 32, POOL)),
            "run with the instruction EmbedderDP, and `model.instruction` is ExtractorDP",
        ),
        (
            lambda: optimization(EmbedderDP(length=5)),
            r"`instruction.weight` has the shape \(4, 3, 16\) .* \(4, 5, 16\)",
        ),
        (lambda: InstructionTuning(RandomSeq2Seq(dict(TINY_T5))), "EmbedderDP, and `model.instruction` is none"),
    ],
)
def test_a_checkpoint_of_another_form_is_refused_by_name(change, message, blank_exemplars, tmp_path):
    trainer, tasks = quiet_trainer(max_steps=2, limit_val_batches=0), data(blank_exemplars, tmp_path)
    trainer.fit(optimization(EmbedderDP(length=3)), tasks)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(max_steps=4).fit(change(), data(blank_exemplars, tmp_path), ckpt_path=tmp_path / "saved.ckpt")


def test_a_checkpoint_of_other_tasks_or_of_another_estimator_is_refused_by_name(blank_exemplars, tmp_path):
    trainer, tasks = quiet_trainer(max_steps=2, limit_val_batches=0), data(blank_exemplars, tmp_path)
    trainer.fit(optimization(EmbedderDP(length=3)), tasks)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    other = optimization(EmbedderDP(length=3))
    other.hypergradient = Chebyshev()
    with pytest.raises(ConfigurationError, match=r"state of Neumann, and `model\.hypergradient` is"):
        quiet_trainer(max_steps=4).fit(other, data(blank_exemplars, tmp_path), ckpt_path=tmp_path / "saved.ckpt")
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    content["instruction"]["tasks"][1] = "task999_other"
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(ConfigurationError, match=r"for 4 train tasks, .* `task002_label_train` is the first of 2"):
        quiet_trainer(max_steps=4).fit(
            optimization(EmbedderDP(length=3)), data(blank_exemplars, tmp_path), ckpt_path=tmp_path / "changed.ckpt"
        )


@pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize("learned", [True, False])
def test_a_module_is_loaded_from_its_checkpoint_before_there_is_data(learned, blank_exemplars, tmp_path):
    def made(length: int = 3) -> dict[str, Any]:
        given = {"backbone": RandomSeq2Seq(dict(TINY_T5)), "instruction": EmbedderDP(length), "max_new_tokens": 3}
        return given | ({"hypergradient": Neumann(terms=1, step_size=1e-3)} if learned else {})

    kind = InstructionOptimization if learned else InstructionTuning
    module, trainer = kind(**made()), quiet_trainer(max_steps=3, limit_val_batches=0)
    trainer.fit(module, data(blank_exemplars, tmp_path))
    trainer.save_checkpoint("run.ckpt")
    loaded = kind.load_from_checkpoint("run.ckpt", **made())
    (scores,) = quiet_trainer().test(loaded, data(blank_exemplars, tmp_path), verbose=False)
    assert scores == quiet_trainer().test(module, data(blank_exemplars, tmp_path), verbose=False)[0]
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)
    other = kind.load_from_checkpoint("run.ckpt", **made(length=4))
    with pytest.raises(ConfigurationError, match="has the shape"):
        quiet_trainer().test(other, data(blank_exemplars, tmp_path), verbose=False)


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_what_other_processes_trained_comes_back_to_a_script(strategy, blank_exemplars, tmp_path):
    torch.manual_seed(0)
    module, tasks = optimization_to_pickle(), data(blank_exemplars, tmp_path)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    quiet_trainer(
        max_steps=4, devices=2, strategy=strategy, limit_val_batches=0, enable_checkpointing=True, callbacks=[saving]
    ).fit(module, tasks)
    quiet_trainer().test(module, tasks, verbose=False)  # makes the model in this process
    saved = torch.load(tmp_path / "saved" / "step=4.ckpt", weights_only=True)["state_dict"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, saved[name]) if isinstance(value, torch.Tensor) else True, name


def test_unseen_tasks_are_given_what_an_instance_is_converted_to_where_asked_for(blank_exemplars, tmp_path):
    losses = {}
    for instructed in (False, True):
        torch.manual_seed(0)
        module = optimization(EmbedderIC(Linear(length=3), targets=False))
        module.instructed_evaluation = instructed
        trainer = quiet_trainer(max_steps=2, limit_val_batches=1)
        tasks = data(blank_exemplars, tmp_path)
        trainer.fit(module, tasks)
        trainer.test(module, tasks, verbose=False)
        losses[instructed] = trainer.callback_metrics["test/loss"].item()
    assert losses[True] != losses[False]


@pytest.mark.parametrize("form", [lambda: EmbedderDP(length=3), EmbedderIC, TaskWeights])
def test_forms_without_an_instruction_for_unseen_tasks_are_refused_by_name(form, blank_exemplars, tmp_path):
    module = optimization(form())
    module.instructed_evaluation = True
    with pytest.raises(ConfigurationError, match=r"has no instruction for 4 dev and test tasks, such as `task\d+_"):
        quiet_trainer(max_steps=1).fit(module, data(blank_exemplars, tmp_path))


class KeepWeights(pl.Callback):
    """Writes the trained weights from within the process that trained them."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / "weights.pt")


def test_two_processes_train_alike_and_gather_predictions_once(blank_exemplars, tmp_path):
    results = {}
    for devices, strategy, batch_size in ((1, "auto", 8), (2, "ddp_fork", 4)):
        torch.manual_seed(0)
        root = tmp_path / str(devices)
        module, tasks = optimization(EmbedderDP(length=2)), data(blank_exemplars, root, batch_size=batch_size)
        tasks.outer_batch_size = batch_size
        trainer = quiet_trainer(
            max_steps=4,
            devices=devices,
            strategy=strategy,
            limit_val_batches=0,
            callbacks=[Results(table=False), KeepWeights()],
            default_root_dir=root,
        )
        trainer.fit(module, tasks)
        trainer.test(module, tasks, verbose=False)
        lines = (root / "predictions.jsonl").read_text().splitlines()
        results[devices] = (torch.load(root / "weights.pt"), [json.loads(line)["id"] for line in lines])
    assert results[1][1] == results[2][1]
    assert len(results[2][1]) == 16
    # Targets have equal lengths here, so the mean over processes is the mean over the global batch.
    for name, value in results[1][0].items():
        torch.testing.assert_close(results[2][0][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("instances", [5, 1])
def test_two_processes_evaluate_few_instances_once(instances, blank_exemplars, tmp_path):
    few_rows = dataclasses.replace(blank_exemplars, dev_tasks=1, test_tasks=1, instances=instances)
    found = {}
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        torch.manual_seed(0)
        root = tmp_path / str(devices)
        module = Echo(RandomSeq2Seq(dict(TINY_T5)), max_new_tokens=3)
        options = {"devices": devices, "strategy": strategy, "callbacks": [Results(table=False)]}
        trainer = quiet_trainer(default_root_dir=root, **options)
        (dev,) = trainer.validate(module, data(few_rows, root), verbose=False)
        trainer.test(module, data(few_rows, root), verbose=False)
        tested = (root / "predictions.jsonl").read_text()
        trainer.predict(module, data(few_rows, root), return_predictions=False)
        assert (root / "predictions.jsonl").read_text() == tested
        lines = [json.loads(line)["id"] for line in tested.splitlines()]
        found[devices] = lines, json.loads((root / "metrics.json").read_text()) | dev
    assert len(set(found[1][0])) == instances
    assert found[1][0] == found[2][0]
    assert found[1][1] == pytest.approx(found[2][1], rel=1e-6)
    assert found[1][1]["test/exact_match"] == found[1][1]["dev/exact_match"] == {5: 40.0, 1: 100.0}[instances]


def test_scores_of_a_run_in_half_precision_are_not_rounded(blank_exemplars, tmp_path):
    rows = dataclasses.replace(blank_exemplars, test_tasks=3, instances=7)
    module = Echo(RandomSeq2Seq(dict(TINY_T5)), max_new_tokens=3)
    trainer = quiet_trainer(precision="bf16-true", callbacks=[Results(table=False)], default_root_dir=tmp_path)
    trainer.test(module, data(rows, tmp_path), verbose=False)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["test/exact_match"] == pytest.approx(200 / 7, rel=1e-6)
    assert found["test/loss"] != torch.tensor(found["test/loss"]).bfloat16().item()


class Echo(InstructionTuning):
    """Predicts the first two instances of a task as they should be, and the others wrongly."""

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        numbers = batch.instance[batch.instance >= 0].tolist()
        return [
            row | {"prediction": row["references"][0] if number < 2 else "other"}
            for row, number in zip(super().predict_step(batch, batch_idx), numbers, strict=True)
        ]


def test_no_validation_tasks_are_refused(blank_exemplars, tmp_path):
    tasks = data(blank_exemplars, tmp_path)
    blank_exemplars.write(tmp_path)
    (tmp_path / "splits" / "default" / "validation_tasks.txt").unlink()
    tasks.validation_tasks, tasks.prepare_data = 0, lambda: super(BlankExemplarsDataModule, tasks).prepare_data()
    with pytest.raises(ConfigurationError, match=r"no validation tasks.*set `data.validation_tasks` above 0"):
        quiet_trainer(max_steps=1).fit(optimization(EmbedderDP(length=2)), tasks)


def test_another_data_module_is_refused():
    with pytest.raises(ConfigurationError, match="needs a NaturalInstructionsDataModule"):
        quiet_trainer(max_steps=1).fit(optimization(EmbedderDP(length=2)), pl.LightningDataModule())


def test_a_prompt_may_hold_the_definition_beside_what_is_learned(blank_exemplars, tmp_path):
    tasks = data(blank_exemplars, tmp_path)
    tasks.prompts["train"] = PromptFormat(positive_examples=0)
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(optimization(EmbedderDP(length=2)), tasks)
    text = tasks.tokenizer.decode(next(iter(tasks.train_dataloader()["inner"])).input_ids[0])
    assert text.startswith("definition : answer with the word that belongs to this task . now complete")
