"""The trained model, for transformers alone."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.export.folder import new_folder


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer, for ``from_pretrained`` of transformers.

    Args:
        model: The trained model, e.g. ``module.backbone.model``.
        tokenizer: Its tokenizer, e.g. ``module.data.tokenizer``.
        folder: A new folder.

    Raises:
        ConfigurationError: If the folder is not empty.
    """
    new_folder(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
