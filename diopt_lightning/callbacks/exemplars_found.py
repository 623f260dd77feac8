"""How far the blank-exemplar experiment has come."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diopt_lightning.data.collate import Batch
from diopt_lightning.data.synthetic import BLANK
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions import ExtractorDP, ExtractorIC
from diopt_lightning.instructions.base import Embed
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
        extractor = pl_module.instruction
        if isinstance(extractor, ExtractorDP):
            found = exemplars_found(extractor)
        else:
            assert isinstance(extractor, ExtractorIC)
            found = exemplars_found_for(extractor, batch["inner"], pl_module.backbone.embed)
        pl_module.log("exemplars_found", found, prog_bar=True)


def exemplars_found(extractor: ExtractorDP) -> float:
    """Share of tasks whose most likely exemplar is not blank."""
    chosen = extractor.probabilities()[:, 0].argmax(dim=-1).tolist()
    found = [BLANK not in texts[choice] for texts, choice in zip(extractor.candidate_texts, chosen, strict=True)]
    return sum(found) / len(found)


def exemplars_found_for(extractor: ExtractorIC, batch: Batch, embed: Embed) -> float:
    """Share of a batch's instances whose most likely exemplar is not blank."""
    chosen = extractor.choices(batch, embed)[:, 0].tolist()
    tasks = batch.task.tolist()
    found = [BLANK not in extractor.candidate_texts[task][choice] for task, choice in zip(tasks, chosen, strict=True)]
    return sum(found) / len(found)
