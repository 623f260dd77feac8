"""Encoder-decoder models of transformers."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.backbones.base import Backbone, prepend
from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions.base import InstructionEmbeddings


class Seq2Seq(Backbone):
    """Any ``AutoModelForSeq2SeqLM``: instructions are prepended to the encoder's input embeddings.

    The model keeps its fast attention kernel. Where an exact hypergradient needs one that is twice differentiable, the
    engine switches it for that step alone.

    Args:
        pretrained: Name on the hub, or folder, of a pretrained model, e.g. ``google/t5-base-lm-adapt``.
        config: Instead of that, a configuration for a model with random weights: ``model_type`` and its options, e.g.
            ``{"model_type": "t5", "d_model": 64}``. The vocabulary's size and the special tokens are the tokenizer's
            unless given.

    Raises:
        ConfigurationError: If not exactly one of the two is given, or the configuration names no known model.

    Example:
        >>> backbone = Seq2Seq(config={"model_type": "t5", "d_model": 64, "num_layers": 2})
        >>> Seq2Seq(pretrained="google/t5-base-lm-adapt", config={"model_type": "t5"})
        Traceback (most recent call last):
        ...
        diopt_lightning.errors.ConfigurationError: Give `pretrained` or `config`, not both: ...
    """

    model: PreTrainedModel

    def __init__(self, pretrained: str | None = None, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        if pretrained is not None and config is not None:
            raise ConfigurationError(
                f"Give `pretrained` or `config`, not both: got {pretrained!r} and {config!r}. To replace a pretrained "
                "model from a configuration file on the command line, set it to `null`."
            )
        if pretrained is None and config is None:
            raise ConfigurationError("Give a `pretrained` model or a `config` with a `model_type` for random weights.")
        if config is not None and "model_type" not in config:
            raise ConfigurationError(f"`config` needs a `model_type` such as `t5`, got {config!r}.")
        self.pretrained = pretrained
        self.config = config

    @property
    def embedding(self) -> nn.Embedding:
        """The encoder's input embedding."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def build(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the model, or make it from the configuration; see :class:`Backbone`."""
        if hasattr(self, "model"):
            return
        model = self._load(self.pretrained) if self.pretrained is not None else self._make(tokenizer)
        name = self.pretrained or f"config {self.config}"
        embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        if len(tokenizer) > embeddings:
            raise ConfigurationError(
                f"The tokenizer has {len(tokenizer)} tokens, and the model ({name}) {embeddings} embeddings: "
                "`data.tokenizer` must be the one of the model, or `vocab_size` of the configuration at least as large."
            )
        for role in ("pad", "eos"):
            ours, theirs = getattr(tokenizer, f"{role}_token_id"), getattr(model.config, f"{role}_token_id")
            if ours != theirs:
                raise ConfigurationError(
                    f"The {role} token is {ours} in the tokenizer and {theirs} in the model ({name}): "
                    "`data.tokenizer` must be the one of the model."
                )
        # `from_pretrained` returns a model in evaluation mode, in which dropout would stay off while training.
        self.model = model.train()

    def loss(self, batch: Batch, instruction: InstructionEmbeddings | None = None) -> Tensor:
        """Mean token-level cross-entropy of ``batch.labels``, a scalar; see :class:`Backbone`."""
        embeddings, mask = self.embedding(batch.input_ids), batch.attention_mask
        if instruction is not None:
            embeddings, mask = prepend(instruction, embeddings, mask)
        loss: Tensor = self.model(inputs_embeds=embeddings, attention_mask=mask, labels=batch.labels).loss
        return loss

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> Tensor:
        """Greedy outputs ``(batch, up to max_new_tokens + 1)``; see :class:`Backbone`."""
        generate = cast(Callable[..., Tensor], self.model.generate)
        return generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )

    def _load(self, name: str) -> PreTrainedModel:
        try:
            # In float32 whatever the file holds: Lightning's precision decides what is computed in.
            model: PreTrainedModel = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
            return model
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"Cannot load `{name}` as an encoder-decoder model: it is neither a folder with one nor a "
                f"name on the hub that can be reached ({str(error).strip().splitlines()[0]})."
            ) from error

    def _make(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        options = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # The decoder begins with the pad token, as in T5.
            "decoder_start_token_id": tokenizer.pad_token_id,
            **(self.config or {}),
        }
        try:
            config = AutoConfig.for_model(**options)
            model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config)  # type: ignore[no-untyped-call]
            return model
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"`config` {self.config!r} makes no encoder-decoder model: {error}") from error
