"""Whether a family of transformers' models can be trained here, found out on a short text before training."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diopt_lightning.errors import ConfigurationError

Logits = Callable[[bool, int], Tensor]
"""Logits ``(1, length, vocabulary)`` by ids or by vectors (true), with so many of the last target tokens left out."""


def check_suitability(model: PreTrainedModel, name: str, logits: Logits, generate: Callable[[], Tensor]) -> None:
    """Check that a model reads vectors as it reads their tokens, does not look ahead in a target, and generates.

    Args:
        model: The model.
        name: What the user calls it.
        logits: Computes logits of a short text.
        generate: Generates from it.

    Raises:
        ConfigurationError: If it does not.
    """
    if model.device.type == "meta":
        return
    training = model.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.train(False)
        try:
            by_ids, by_vectors, shorter = logits(False, 0), logits(True, 0), logits(True, 1)
            generate()
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            raise ConfigurationError(
                f"{type(model).__name__} ({name}) does not work with vectors in the place of tokens, or does not "
                f"generate ({type(error).__name__}: {said}): use another family of models, or options of its "
                "configuration that let it."
            ) from error
        finally:
            model.train(training)
    # In half precision two ways to compute the same differ by much more.
    limit = (1e-3 if by_ids.dtype == torch.float32 else 0.1) * by_ids.std()
    if (by_ids - by_vectors).abs().max() > limit:
        raise ConfigurationError(
            f"{type(model).__name__} ({name}) reads tokens otherwise than their embeddings, and an instruction is made "
            "of embeddings: use another family of models."
        )
    if (by_vectors[:, : shorter.shape[1]] - shorter).abs().max() > limit:
        raise ConfigurationError(
            f"{type(model).__name__} ({name}) looks ahead at the target that it is to predict: use another family of "
            "models, or set `is_decoder` to true in its configuration if it has that."
        )
