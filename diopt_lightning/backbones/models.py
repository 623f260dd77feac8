"""Models of transformers: pretrained ones, and ones with random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from diopt_lightning.errors import ConfigurationError


def pretrained_model(auto: Any, name: str, dtype: torch.dtype, family: str) -> PreTrainedModel:
    """Load a pretrained model.

    Args:
        auto: ``AutoModelForSeq2SeqLM`` or ``AutoModelForCausalLM``.
        name: Name on the hub, or folder.
        dtype: Precision of its weights, whatever the file holds.
        family: What is looked for, in words.

    Raises:
        ConfigurationError: If it cannot be loaded.
    """
    try:
        model: PreTrainedModel = auto.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"Cannot load `{name}` as {family}: it is neither a folder with one nor a name on the hub that can be "
            f"reached ({str(error).strip().splitlines()[0]})."
        ) from error
    return model


def random_model(auto: Any, options: Mapping[str, Any], dtype: torch.dtype | None, family: str) -> PreTrainedModel:
    """Make a model with random weights.

    Args:
        auto: ``AutoModelForSeq2SeqLM`` or ``AutoModelForCausalLM``.
        options: ``model_type`` and the options of its configuration.
        dtype: Precision of its weights. ``None`` for PyTorch's default.
        family: What is made, in words.

    Raises:
        ConfigurationError: If the options make no such model.
    """
    try:
        model: PreTrainedModel = auto.from_config(AutoConfig.for_model(**options), dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"`config` {dict(options)!r} makes no {family}: {error}") from error
    return model


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that does not say what it is of.

    Raises:
        ConfigurationError: If there is no ``model_type``.
    """
    if "model_type" not in config:
        raise ConfigurationError(
            f"`config` of a random model needs a `model_type` such as `t5` or `llama`, got {dict(config)!r}."
        )
