"""How far the blank-exemplar experiment has come."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from diopt_lightning.data.synthetic import BLANK
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions import Extractor, ExtractorDP, ExtractorIC
from diopt_lightning.modules.evaluation import InstructionEvaluation


class ExemplarsFound(Callback):
    """Logs ``exemplars_found``: the share of train tasks whose most likely exemplar is the real one.

    Of an extractor by instance conversion it is the share of the instances in the inner batch. It looks at the
    experiment's key, which nothing that learns can see.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to look at.

        Raises:
            ConfigurationError: If the module has no extractor that learns.
        """
        extractors = (ExtractorDP, ExtractorIC)
        if not (isinstance(pl_module, InstructionEvaluation) and isinstance(pl_module.instruction, extractors)):
            raise ConfigurationError(
                "The callback ExemplarsFound needs a module whose `instruction` is an ExtractorDP or an ExtractorIC: "
                "remove the callback."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the share."""
        assert isinstance(pl_module, InstructionEvaluation)
        extractor, batch = pl_module.instruction, batch["inner"]
        if isinstance(extractor, ExtractorDP):
            choices = extractor.probabilities()[:, 0].argmax(dim=-1)
            found = exemplars_found(extractor, torch.arange(len(choices)), choices)
        else:
            assert isinstance(extractor, ExtractorIC)
            choices = extractor.choices(batch, pl_module.backbone.embed)[:, 0]
            found = exemplars_found(extractor, batch.task, choices)
        pl_module.log("exemplars_found", found, prog_bar=True)


def exemplars_found(extractor: Extractor, tasks: Tensor, choices: Tensor) -> float:
    """Share of choices for these tasks that are not blank."""
    texts = [extractor.candidate_texts[t][c] for t, c in zip(tasks.tolist(), choices.tolist(), strict=True)]
    return sum(BLANK not in text for text in texts) / len(texts)
