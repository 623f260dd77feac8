"""How a model reads the data's texts: what a data module has to know of the module that it is trained with."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.text_format import TextFormat, encoder_decoder_format


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Args:
        text_format: What stands around sources and targets.
        instruction_length: Positions that a learned instruction takes from the limit of a source.
        instructed_evaluation: Whether sources of dev and test tasks have one too.
    """

    text_format: TextFormat
    instruction_length: int = 0
    instructed_evaluation: bool = False

    def reserved_length(self, split: str) -> int:
        """Positions of the sources of a set of tasks that a learned instruction takes."""
        instructed = split == "train" or (self.instructed_evaluation and split in ("dev", "test"))
        return self.instruction_length if instructed else 0


@runtime_checkable
class ReadsTexts(Protocol):
    """A module that says how its model reads texts. The texts of any other are those of an encoder-decoder model."""

    def reading(self, tokenizer: PreTrainedTokenizerBase) -> Reading:
        """Return how texts are read by the model, given its tokenizer."""


def reading_of(module: Any, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """How a module's model reads texts; as an encoder-decoder model does if it does not say."""
    if isinstance(module, ReadsTexts):
        return module.reading(tokenizer)
    return Reading(encoder_decoder_format(tokenizer))
