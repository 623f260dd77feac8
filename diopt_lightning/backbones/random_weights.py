"""Models of transformers with random weights."""

from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.backbones.transformer import TransformersBackbone, number_of_ids
from diopt_lightning.errors import ConfigurationError, users_mistake

# Their positions pass over the pad token: a decoder that began with it would count otherwise with a cache than without.
BEGINS_WITH_END = ("m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2")


class RandomWeights(TransformersBackbone):
    """Common to models that are drawn for a configuration; stands before their family among a class's bases.

    Args:
        config: ``model_type`` and its options, e.g. ``{"model_type": "llama", "hidden_size": 64}``; others are the
            defaults of that type. The vocabulary's size and the special tokens are the tokenizer's unless given.
        options: As of the family.

    Raises:
        ConfigurationError: If there is no ``model_type``.
    """

    is_pretrained = False

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        if "model_type" not in config:
            raise ConfigurationError(
                f"`config` of a random model needs a `model_type` such as `t5` or `llama`, got {config!r}."
            )
        super().__init__(f"random {config['model_type']}", **options)
        self.options = config

    def make(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None) -> PreTrainedModel:
        """Draw the weights; see :class:`TransformersBackbone`."""
        begins_with_end = self.options["model_type"] in BEGINS_WITH_END
        start = tokenizer.eos_token_id if begins_with_end else tokenizer.pad_token_id
        options = {
            "vocab_size": number_of_ids(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # A decoder that reads a source from an encoder begins with the pad token, as in T5.
            **({"decoder_start_token_id": start} if self.is_encoder_decoder else {}),
            **({"bos_token_id": tokenizer.bos_token_id} if not self.is_encoder_decoder and tokenizer.bos_token else {}),
            **self.options,
        }
        family = self.family.partition(" ")[2]  # without its article
        # Which errors transformers raises for nonsense depends on the model.
        what = f"`config` {options!r} makes no {family}"
        with users_mistake(Exception, what=what, then="give options that the model has."):
            config = AutoConfig.for_model(**options)
            return cast(PreTrainedModel, self.auto_class.from_config(config, dtype=dtype, trust_remote_code=False))
