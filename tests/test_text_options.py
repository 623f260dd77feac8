"""Options of training and evaluation on texts: label smoothing, beams, several prompts in one test."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from diopt_lightning import ConfigurationError, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.backbones.rows import token_losses
from diopt_lightning.callbacks import Results
from diopt_lightning.data import NaturalInstructionsDataModule, PromptFormat
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.prompts import prompts_of_evaluation
from diopt_lightning.instructions import EmbedderDP
from tests.backbones import TARGETS, TEXTS, made, rows, some_tokenizer
from tests.conftest import TINY_T5
from tests.helpers import quiet_trainer
from tests.runs import data, optimization


def test_label_smoothing_is_that_of_transformers():
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 2:] = -100
    expected = LabelSmoother(0.3)({"logits": logits}, labels.clone())
    torch.testing.assert_close(token_losses(logits, labels, 0.3).sum() / (labels >= 0).sum(), expected)


def test_the_inner_loss_alone_is_smoothed(blank_exemplars, tmp_path):
    module, tasks = optimization(EmbedderDP(length=2)), data(blank_exemplars, tmp_path)
    module.label_smoothing = 0.4
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, tasks)
    batches = {level: next(iter(loader)) for level, loader in tasks.train_dataloader().items()}
    with torch.no_grad():
        instruction = module.instruction(batches["inner"], module.backbone.embed)
        losses = [module.backbone.target_losses(batches["inner"], instruction, share).sum() for share in (0.4, 0.0)]
        tokens = batches["inner"].target_tokens
        torch.testing.assert_close(module.inner_loss(batches["inner"]), losses[0] / tokens)
        assert (losses[0] - losses[1]).abs() > 0.01
        torch.testing.assert_close(module.outer_loss(batches["outer"]), module.backbone.loss(batches["outer"]))
    trainer.test(module, tasks, verbose=False)
    smoothed = trainer.callback_metrics["test/loss"].item()
    module.label_smoothing = 0.0
    trainer.test(module, tasks, verbose=False)
    assert trainer.callback_metrics["test/loss"].item() == smoothed


def test_a_baseline_is_smoothed_too(blank_exemplars, tmp_path):
    found = []
    for share in (0.0, 0.4):
        torch.manual_seed(0)
        module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), EmbedderDP(length=2), label_smoothing=share)
        trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(module, data(blank_exemplars, tmp_path))
        found.append(trainer.callback_metrics["inner_loss"].item())
    assert abs(found[0] - found[1]) > 0.01
    with pytest.raises(ConfigurationError, match="`label_smoothing` must be at least 0 and below 1, got 1"):
        InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), label_smoothing=1)


PROMPTS = {
    "none": PromptFormat(definition=False, positive_examples=0),
    "one_example": PromptFormat(definition=False, positive_examples=1),
}


def test_several_prompts_of_one_test_are_scored_as_each_alone(blank_exemplars, tmp_path):
    def tested(root: Path, prompt: Any) -> tuple[dict[str, float], dict[str, str], float]:
        torch.manual_seed(0)
        tasks = data(blank_exemplars, root)
        tasks.prompts |= prompts_of_evaluation(prompt)
        if isinstance(prompt, dict):
            del tasks.prompts["test"]
        module = optimization(EmbedderDP(length=2))
        trainer = quiet_trainer(default_root_dir=root, callbacks=[Results(table=False)])
        (dev,) = trainer.validate(module, tasks, verbose=False)
        trainer.test(module, tasks, verbose=False)
        names = [path.name for path in root.glob("predictions*.jsonl")]
        written = {name: (root / name).read_text() for name in names}
        for name in names:
            (root / name).unlink()
        trainer.predict(module, tasks)
        assert {name: (root / name).read_text() for name in names} == written
        return json.loads((root / "metrics.json").read_text()), written, dev["dev/loss"]

    together, files, dev = tested(tmp_path / "together", PROMPTS)
    assert sorted(files) == ["predictions_none.jsonl", "predictions_one_example.jsonl"]
    for name, prompt in PROMPTS.items():
        alone, file, dev_alone = tested(tmp_path / name, prompt)
        scores = {key.replace(f"/{name}/", "/"): value for key, value in together.items() if f"/{name}/" in key}
        # Of several prompts the official names do not tell which one they are of.
        assert scores == {key: value for key, value in alone.items() if key.startswith("test/")}
        lines = [json.loads(line) for line in files[f"predictions_{name}.jsonl"].splitlines()]
        assert {line.pop("prompt") for line in lines} == {name}
        assert lines == [json.loads(line) for line in file["predictions.jsonl"].splitlines()]
        assert (dev == dev_alone) == (name == "none")  # dev tasks have the first prompt
    assert together["test/none/loss"] != together["test/one_example/loss"]
    assert len(together) == 2 * len(scores)


@pytest.mark.parametrize(("prompts", "message"), [({}, "got none"), ({"a/b": PromptFormat()}, "got the name 'a/b'")])
def test_prompts_without_names_for_files_are_refused(prompts, message, tmp_path):
    with pytest.raises(ConfigurationError, match=f"`data.test_prompt` is a prompt, or several by names .*{message}"):
        NaturalInstructionsDataModule(str(tmp_path), "tokenizer", test_prompt=prompts)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_enough_beams_find_the_best_of_all_outputs(family):
    tokenizer = some_tokenizer()
    backbone = made(family, tokenizer).eval()
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    vocabulary, end, best = len(tokenizer), tokenizer.eos_token_id, []
    first = torch.arange(vocabulary)
    pairs = torch.stack([first.repeat_interleave(vocabulary), first.repeat(vocabulary)], dim=1)
    pairs = pairs[(pairs[:, 0] != end)]
    for index in range(len(TEXTS)):
        row = Batch(*(column[index : index + 1].expand(len(pairs), *column.shape[1:]) for column in batch))
        with torch.no_grad():
            scores = -backbone.target_losses(row._replace(labels=pairs), None) / 2
        best.append(pairs[scores.argmax()])
    found = backbone.generate(batch, 2, num_beams=vocabulary)[:, -2:]
    greedy = backbone.generate(batch, 2)[:, -2:]
    assert torch.equal(found, torch.stack(best))
    assert not torch.equal(found, greedy)


def test_a_module_generates_with_the_beams_it_is_given(blank_exemplars, tmp_path):
    found = {}
    for beams in (1, 4):
        torch.manual_seed(0)
        module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), max_new_tokens=3, num_beams=beams)
        trainer = quiet_trainer()
        trainer.test(module, data(blank_exemplars, tmp_path), verbose=False)
        with torch.no_grad():
            for parameter in module.backbone.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        batch = next(iter(trainer.datamodule.test_dataloader()))
        outputs = module.backbone.eval().generate(batch, 3, num_beams=beams)
        texts = [text.strip() for text in trainer.datamodule.tokenizer.batch_decode(outputs, skip_special_tokens=True)]
        found[beams] = [prediction["prediction"] for prediction in module.predict_step(batch, 0)]
        assert found[beams] == texts
    assert found[1] != found[4]


def test_beams_of_a_backbone_without_are_refused():
    class Greedy(RandomSeq2Seq):
        searches_beams = False

    with pytest.raises(ConfigurationError, match="`num_beams` must be 1 for Greedy, got 2"):
        InstructionTuning(Greedy(dict(TINY_T5)), num_beams=2)


def test_an_optimizer_that_divides_by_zero_in_half_precision_is_refused(blank_exemplars, tmp_path):
    module = InstructionTuning(RandomSeq2Seq(dict(TINY_T5)), optimizer=torch.optim.Adam)
    with pytest.raises(ConfigurationError, match="`eps` of Adam is 1e-08, which is 0 in float16"):
        quiet_trainer(max_steps=1, precision="16-true").fit(module, data(blank_exemplars, tmp_path))
