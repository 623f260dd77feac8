"""The trained model, for transformers alone."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.export.folder import new_folder


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer, for ``from_pretrained`` of transformers.

    Args:
        model: The trained model, e.g. ``plain_model(module.backbone.model)``.
        tokenizer: Its tokenizer, e.g. ``module.data.tokenizer``.
        folder: A new folder.

    Raises:
        ConfigurationError: If the folder is not empty.
    """
    new_folder(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """Return a trained model with its adapters, if there are any, added to the weights that they adapt.

    Raises:
        ConfigurationError: If the adapters' method cannot be added to weights.
    """
    if isinstance(model, PreTrainedModel):
        return model
    merge = getattr(model, "merge_and_unload", None)
    merged = merge() if callable(merge) else None
    if not isinstance(merged, PreTrainedModel):
        raise ConfigurationError(
            f"The adapters of {type(model).__name__} cannot be added to the model's weights: save them by "
            "`module.backbone.model.save_pretrained`."
        )
    return merged
