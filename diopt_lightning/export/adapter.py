"""Soft instructions as PEFT's prompt-tuning adapters."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from diopt_lightning.errors import ConfigurationError
from diopt_lightning.export.comparison import log_probabilities, require_equal
from diopt_lightning.export.folder import file_name, new_folder


def export_adapter(
    embeddings: Mapping[str, Tensor],
    folder: Path,
    encoder_decoder: bool = True,
    base: str | None = None,
    model: PreTrainedModel | None = None,
) -> None:
    """Write an adapter of each task to ``folder/TASK``, for ``PeftModel.from_pretrained(model, folder / TASK)``.

    What cannot stand in the name of a file is spelled out there; see :func:`~diopt_lightning.export.folder.file_name`.

    ``model`` must be the one that was trained with the instruction (:func:`~diopt_lightning.export.export_model`), not
    the pretrained one that training began with. Its inputs must be padded at the end, as they are here: PEFT puts an
    adapter before the padding, and before a token that begins a sequence.

    Args:
        embeddings: Name of each task to its soft instruction ``(length, dim)``.
        folder: A new folder.
        encoder_decoder: Whether the model is one; the instruction then stands before the encoder's input alone.
        base: Folder, or name on the hub, of the trained model, by which PEFT's ``AutoPeftModel`` finds it.
        model: The trained model, with which the first adapter is read again and compared on a batch. Default: none is.

    Raises:
        ConfigurationError: If PEFT is not installed, the folder is not empty, or what is read again is something else.
    """
    try:
        from peft import PeftModel, PromptTuningConfig, TaskType
        from peft.utils import SAFETENSORS_WEIGHTS_NAME
    except ImportError as error:
        raise ConfigurationError(
            f"An adapter is written with PEFT, which cannot be imported ({error}): pip install 'diopt_lightning[peft]'."
        ) from error
    with new_folder(folder):
        for name, rows in embeddings.items():
            config = PromptTuningConfig(
                task_type=TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM,
                base_model_name_or_path=base,
                num_virtual_tokens=rows.shape[0],
                token_dim=rows.shape[1],
                # Left out, PEFT takes 2 for an encoder-decoder model, and expects a prompt for its decoder as well.
                num_transformer_submodules=1,
                inference_mode=True,
            )
            config.save_pretrained(str(folder / file_name(name)))
            # What PEFT's own `save_pretrained` writes, without a model to attach the adapter to.
            save_file(
                {"prompt_embeddings": rows.detach().cpu().clone()}, folder / file_name(name) / SAFETENSORS_WEIGHTS_NAME
            )
        if model is not None:
            name, rows = next(iter(embeddings.items()))
            trained = log_probabilities(model, rows)
            found = log_probabilities(PeftModel.from_pretrained(model, folder / file_name(name)))
            require_equal(found, trained, f"The adapter of `{name}`", "Export another `format` (`embeddings`).")
