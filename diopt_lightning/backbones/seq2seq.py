"""Encoder-decoder models of transformers: T5, UMT5, BART."""

from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.backbones.random_weights import RandomWeights
from diopt_lightning.backbones.rows import compact, token_losses
from diopt_lightning.backbones.transformer import Source, TransformersBackbone
from diopt_lightning.data.collate import IGNORED_LABEL, Batch
from diopt_lightning.data.text_format import TextFormat, encoder_decoder_format
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import InstructionEmbeddings


class Seq2Seq(TransformersBackbone):
    """A pretrained ``AutoModelForSeq2SeqLM``: instructions are put before the encoder's input embeddings.

    The encoder reads ``[instruction ; input]`` (behind the token that begins a sequence, if the tokenizer has one), and
    the decoder's targets are the labels. The model keeps its fast attention kernel; where an exact hypergradient needs
    one that is twice differentiable, the engine switches it for that step alone.

    Args:
        pretrained: Name on the hub, or folder, of a pretrained model, e.g. ``google/t5-base-lm-adapt``.
        options: As of every :class:`TransformersBackbone`.

    Example:
        >>> backbone = Seq2Seq("google/t5-base-lm-adapt")  # loaded when training starts
    """

    is_encoder_decoder = True
    auto_class = AutoModelForSeq2SeqLM
    family = "an encoder-decoder model"

    def __init__(self, pretrained: str, **options: Any) -> None:
        super().__init__(pretrained, **options)

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check the vocabulary, and the tokens that the model itself pads and ends with."""
        super().check(model, tokenizer)
        for role in ("pad", "eos"):
            # Some name several ends, or none.
            ours, theirs = getattr(tokenizer, f"{role}_token_id"), getattr(model.config, f"{role}_token_id", None)
            if theirs is not None and ours not in (theirs if isinstance(theirs, list) else [theirs]):
                raise ConfigurationError(
                    f"The {role} token is {ours} in the tokenizer and {theirs} in the model ({self.name}): "
                    "`data.tokenizer` must be the one of the model."
                )

    def text_format(self, tokenizer: PreTrainedTokenizerBase) -> TextFormat:
        """Source and target are sequences of their own; see :class:`Backbone`."""
        return encoder_decoder_format(tokenizer)

    def decoder_start(self, text_format: TextFormat) -> int:
        """What stands before a target where the family itself trains; some wrap its last token around."""
        model, start = cast(Any, self.language_model), cast(Any, None)
        with suppress(AttributeError, TypeError, ValueError):  # it has no such method, or its configuration no token
            labels = torch.tensor([[*text_format.target_before, self._pad + 1, *text_format.target_after]])
            start = int(model.prepare_decoder_input_ids_from_labels(labels=labels)[0, 0])
        for source in (model.config, model.generation_config):
            start = getattr(source, "decoder_start_token_id", None) if start is None else start
        if not isinstance(start, int) or not 0 <= start < len(self.embedding.weight):
            raise ConfigurationError(
                f"The model ({self.name}) does not say what its decoder begins with, but {start}: set "
                "`decoder_start_token_id` in its configuration to one token."
            )
        return start

    def check_lengths(self, source: int, target: int) -> None:
        """Check encoder and decoder; see :class:`Backbone`."""
        # T5's positions are relative, and its configuration names none.
        self._check_positions(max(source, target), "A source or a target")

    def read(self, batch: Batch, instruction: InstructionEmbeddings | None) -> tuple[Tensor, Tensor]:
        """What the encoder reads, padded at the end; see :class:`TransformersBackbone`."""
        embeddings, mask = super().read(batch, instruction)
        if instruction is not None:
            mask, embeddings = compact(mask, embeddings)
        return embeddings, mask

    def target_losses(
        self, batch: Batch, instruction: InstructionEmbeddings | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Losses ``(batch,)``; see :class:`Backbone`."""
        embeddings, mask = self.read(batch, instruction)
        output = self.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            decoder_input_ids=self._shifted(batch.labels.masked_fill(batch.labels == IGNORED_LABEL, self._pad)),
            use_cache=False,
        )
        return token_losses(output.logits, batch.labels, label_smoothing)

    def logits(self, source: Source, ids: Tensor, left_out: int) -> Tensor:
        """Logits of a target; see :class:`TransformersBackbone`."""
        target = self._shifted(ids)[:, : ids.shape[1] - left_out]
        return cast(Tensor, self.model(**source(ids), decoder_input_ids=target, use_cache=False).logits)

    def _shifted(self, targets: Tensor) -> Tensor:
        return F.pad(targets[:, :-1], (1, 0), value=cast(int, self._start))


class RandomSeq2Seq(RandomWeights, Seq2Seq):
    """An ``AutoModelForSeq2SeqLM`` with random weights, made from a configuration.

    Example:
        >>> backbone = RandomSeq2Seq({"model_type": "t5", "d_model": 64, "num_layers": 2})
    """
