"""Options of training and evaluation on texts: label smoothing, beams, several prompts in one test."""

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from diopt_lightning import ConfigurationError, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.backbones.rows import token_losses
from diopt_lightning.instructions import EmbedderDP
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
