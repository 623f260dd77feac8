"""What a backbone is: a language model that takes instruction embeddings."""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.collate import IGNORED_LABEL, Batch
from diopt_lightning.data.text_format import TextFormat
from diopt_lightning.instructions.base import InstructionEmbeddings, embedded


class Backbone(nn.Module, ABC):
    """A language model whose inputs may hold embeddings instead of tokens.

    The constructor takes the options; :meth:`build` makes the model once the tokenizer is known. A family of models
    says how it reads texts (:meth:`text_format`), what a target costs (:meth:`target_losses`) and how it generates.

    Attributes:
        name: Name on the hub, or folder, of the pretrained model; what it is made of where there is none.
        is_encoder_decoder: Whether an encoder reads the source, and an instruction, apart from the target.
        searches_beams: Whether it generates with several beams too.
    """

    name: str
    is_encoder_decoder: bool
    searches_beams: bool = False

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The input embedding."""

    @abstractmethod
    def text_format(self, tokenizer: PreTrainedTokenizerBase) -> TextFormat:
        """What stands around a source and a target.

        Raises:
            ConfigurationError: If the tokenizer does not have what it needs.
        """

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the model; does nothing if it is there.

        Raises:
            ConfigurationError: If the model cannot be made, or does not fit the tokenizer.
        """

    @abstractmethod
    def target_losses(
        self, batch: Batch, instruction: InstructionEmbeddings | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Sum of the cross-entropies of each row's target tokens given instruction and input, ``(batch,)`` in nats.

        The instruction has a row for each row of the batch. ``label_smoothing`` is as of
        :func:`~diopt_lightning.backbones.rows.token_losses`.
        """

    @abstractmethod
    def generate(
        self, batch: Batch, max_new_tokens: int, instruction: InstructionEmbeddings | None = None, num_beams: int = 1
    ) -> Tensor:
        """Outputs given instruction and input as token ids ``(batch, up to max_new_tokens + 1)``.

        They are greedy, or the best of a search with several beams by mean log probability of a token; more than one is
        asked for only where the backbone has ``searches_beams``. The instruction has no alternatives.
        """

    def check_lengths(self, source: int, target: int) -> None:
        """Refuse texts that are longer than the model has positions for.

        Args:
            source: Tokens of a source at most, those of a learned instruction included.
            target: Tokens of a target at most.

        Raises:
            ConfigurationError: If they do not fit.
        """

    def frozen_names(self) -> list[str]:
        """Names of the parameters that are not learned and are loaded again where the model is made again."""
        return []

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids ``(...)`` as vectors ``(..., dim)`` in float32 at least, in which instructions compute."""
        return embedded(self.embedding, ids)

    def loss(
        self, batch: Batch, instruction: InstructionEmbeddings | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Cross-entropy of the targets given instruction and input, the mean over the batch's target tokens, a scalar.

        Where the instruction has several alternatives for an instance, its loss is their weighted mean. Where it weighs
        instances, their losses are multiplied; the mean is still that over all target tokens.
        """
        num_targets = (batch.labels != IGNORED_LABEL).sum()
        if instruction is None:
            return self.target_losses(batch, None, label_smoothing).sum() / num_targets
        alternatives, weight = instruction.alternatives, instruction.weight
        if alternatives is not None:
            batch = Batch(*(column[alternatives.instance] for column in batch))
        losses = self.target_losses(batch, instruction, label_smoothing)
        if weight is not None:
            losses = (weight if alternatives is None else weight[alternatives.instance]) * losses
        return (losses if alternatives is None else alternatives.weight * losses).sum() / num_targets
