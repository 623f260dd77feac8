"""Encoder-decoder models of transformers."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.backbones.base import Backbone, prepend, token_losses
from diopt_lightning.data.collate import IGNORED_LABEL, Batch
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import InstructionEmbeddings


class Seq2Seq(Backbone):
    """A pretrained ``AutoModelForSeq2SeqLM``: instructions are prepended to the encoder's input embeddings.

    The model keeps its fast attention kernel. Where an exact hypergradient needs one that is twice differentiable, the
    engine switches it for that step alone.

    Args:
        pretrained: Name on the hub, or folder, of a pretrained model, e.g. ``google/t5-base-lm-adapt``.

    Example:
        >>> backbone = Seq2Seq("google/t5-base-lm-adapt")  # loaded when training starts
    """

    model: PreTrainedModel

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        self.name = pretrained

    @property
    def embedding(self) -> nn.Embedding:
        """The encoder's input embedding."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def build(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the model and check that it fits the tokenizer; see :class:`Backbone`."""
        if hasattr(self, "model"):
            return
        model = self.make(tokenizer)
        embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        if len(tokenizer) > embeddings:
            raise ConfigurationError(
                f"The tokenizer has {len(tokenizer)} tokens, and the model ({self.name}) {embeddings} embeddings: "
                "`data.tokenizer` must be the one of the model, or `vocab_size` of its configuration at least as large."
            )
        for role in ("pad", "eos"):
            ours, theirs = getattr(tokenizer, f"{role}_token_id"), getattr(model.config, f"{role}_token_id")
            if ours != theirs:
                raise ConfigurationError(
                    f"The {role} token is {ours} in the tokenizer and {theirs} in the model ({self.name}): "
                    "`data.tokenizer` must be the one of the model."
                )
        # `from_pretrained` returns a model in evaluation mode, in which dropout would stay off while training.
        self.model = model.train()

    def make(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the model.

        Raises:
            ConfigurationError: If it cannot be loaded.
        """
        try:
            # In float32 whatever the file holds: Lightning's precision decides what is computed in.
            model: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(self.name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"Cannot load `{self.name}` as an encoder-decoder model: it is neither a folder with one nor a name on "
                f"the hub that can be reached ({str(error).strip().splitlines()[0]})."
            ) from error
        return model

    def loss(self, batch: Batch, instruction: InstructionEmbeddings | None = None) -> Tensor:
        """Mean token-level cross-entropy of ``batch.labels``, a scalar; see :class:`Backbone`."""
        num_targets = (batch.labels != IGNORED_LABEL).sum()
        alternatives = instruction.alternatives if instruction is not None else None
        if alternatives is not None:
            batch = Batch(*(column[alternatives.instance] for column in batch))
        embeddings, mask = self.embedding(batch.input_ids), batch.attention_mask
        if instruction is not None:
            embeddings, mask = prepend(instruction, embeddings, mask)
        logits = self.model(inputs_embeds=embeddings, attention_mask=mask, labels=batch.labels).logits
        losses = token_losses(logits, batch.labels)
        weight = instruction.weight if instruction is not None else None
        if weight is not None:
            losses = (weight if alternatives is None else weight[alternatives.instance]) * losses
        return (losses if alternatives is None else alternatives.weight * losses).sum() / num_targets

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, instruction: InstructionEmbeddings | None = None) -> Tensor:
        """Greedy outputs ``(batch, up to max_new_tokens + 1)``; see :class:`Backbone`."""
        generate = cast(Callable[..., Tensor], self.model.generate)
        source: dict[str, Tensor] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if instruction is not None:
            embeddings, mask = prepend(instruction, self.embedding(batch.input_ids), batch.attention_mask)
            source = {"inputs_embeds": embeddings, "attention_mask": mask}
        return generate(**source, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)


class RandomSeq2Seq(Seq2Seq):
    """An ``AutoModelForSeq2SeqLM`` with random weights, made from a configuration.

    Args:
        config: ``model_type`` and its options, e.g. ``{"model_type": "t5", "d_model": 64}``; others are the defaults of
            that type. The vocabulary's size and the special tokens are the tokenizer's unless given.

    Raises:
        ConfigurationError: If there is no ``model_type``.

    Example:
        >>> backbone = RandomSeq2Seq({"model_type": "t5", "d_model": 64, "num_layers": 2})
    """

    def __init__(self, config: dict[str, Any]) -> None:
        if "model_type" not in config:
            raise ConfigurationError(f"`config` of a random model needs a `model_type` such as `t5`, got {config!r}.")
        super().__init__(f"random {config['model_type']}")
        self.config = config

    def make(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Make the model from the configuration.

        Raises:
            ConfigurationError: If the configuration makes no encoder-decoder model.
        """
        options = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # The decoder begins with the pad token, as in T5.
            "decoder_start_token_id": tokenizer.pad_token_id,
            **self.config,
        }
        try:
            config = AutoConfig.for_model(**options)
            model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"`config` {self.config!r} makes no encoder-decoder model: {error}") from error
        return model
