"""The trained model, for transformers alone."""

import copy
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from diopt_lightning.errors import OF_A_LIBRARY, ConfigurationError, users_mistake
from diopt_lightning.export.comparison import log_probabilities, require_equal
from diopt_lightning.export.folder import new_folder


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer, for ``from_pretrained`` of transformers.

    The model is read again and compared with what was given, on a batch.

    Args:
        model: The trained model, e.g. ``plain_model(module.backbone.model)``.
        tokenizer: Its tokenizer, e.g. ``module.data.tokenizer``.
        folder: A new folder.

    Raises:
        ConfigurationError: If the folder is not empty, or what is read again is another model.
    """
    with new_folder(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
        what, then = f"The {type(model).__name__} written to {folder}", "transformers cannot keep it."
        with users_mistake(OSError, ValueError, RuntimeError, KeyError, what=f"{what} cannot be read again", then=then):
            written: Any = kind.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
        require_equal(log_probabilities(written.to(model.device)), log_probabilities(model), what, then)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """Return a trained model; one with adapters as a copy in float32, in which they are added to the weights.

    Where an adapter stands before one of several layers that share a weight (embeddings that are tied), each gets a
    weight of its own. The copy is compared with what was given, on a batch.

    Raises:
        ConfigurationError: If the adapters' method cannot be added to weights, or what comes out is another model.
    """
    if isinstance(model, PreTrainedModel):
        return model
    keep = "Save the adapters by `module.backbone.model.save_pretrained`."
    # In float32: what an adapter adds may be less than half precision can hold.
    try:
        adapted = copy.deepcopy(model).float()
    except RuntimeError as error:  # PEFT's `ensure_weight_tying` keeps tensors that are computed
        raise ConfigurationError(
            f"The adapters of {type(model).__name__} cannot be copied ({error}). {keep}"
        ) from error
    trained = log_probabilities(adapted)
    untie(adapted)
    merge = getattr(adapted, "merge_and_unload", None)
    kinds = ", ".join(str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values())
    what = f"The adapters of {type(model).__name__} ({kinds}) cannot be added to the model's weights"
    with users_mistake(*OF_A_LIBRARY, what=what, then=keep), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|no longer tied)")  # as they are meant to be
        merged = merge() if callable(merge) else None
    if not isinstance(merged, PreTrainedModel):
        raise ConfigurationError(f"{what}. {keep}")
    what = f"The {type(merged).__name__} with the adapters in its weights"
    require_equal(log_probabilities(merged), trained, what, keep)
    return merged


def untie(model: nn.Module) -> None:
    """Give every layer a weight of its own where several share one that an adapter of PEFT changes."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for parameter, shared in names.items():
        if len(shared) == 1 or not any("base_layer" in name.split(".") for name in shared):
            continue
        for name in shared[1:]:
            layer, _, own = name.rpartition(".")
            setattr(model.get_submodule(layer), own, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        cast(Any, model).config.get_text_config().tie_word_embeddings = False
        cast(Any, model).config.tie_word_embeddings = False
