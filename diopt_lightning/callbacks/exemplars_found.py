"""How far the blank-exemplar experiment has come."""

from typing import Any

import lightning.pytorch as pl

from diopt_lightning.data.synthetic import BLANK
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions import ExtractorDP
from diopt_lightning.modules.evaluation import InstructionEvaluation


class ExemplarsFound(pl.Callback):
    """Logs ``exemplars_found``: the share of train tasks whose most likely exemplar is the real one.

    It looks at the experiment's key, which nothing that learns can see.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to look at.

        Raises:
            ConfigurationError: If the module has no extractor with free parameters.
        """
        if not (isinstance(pl_module, InstructionEvaluation) and isinstance(pl_module.instruction, ExtractorDP)):
            raise ConfigurationError(
                "The callback ExemplarsFound needs a module whose `instruction` is an ExtractorDP: remove the callback."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the share."""
        assert isinstance(pl_module, InstructionEvaluation)
        assert isinstance(pl_module.instruction, ExtractorDP)
        pl_module.log("exemplars_found", exemplars_found(pl_module.instruction), prog_bar=True)


def exemplars_found(extractor: ExtractorDP) -> float:
    """Share of tasks whose most likely exemplar is not blank."""
    chosen = extractor.probabilities()[:, 0].argmax(dim=-1).tolist()
    found = [BLANK not in texts[choice] for texts, choice in zip(extractor.candidate_texts, chosen, strict=True)]
    return sum(found) / len(found)
