"""Whether a family of transformers' models can be trained here, found out on a short text before training."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diopt_lightning.errors import ConfigurationError, one_line

# By chance the short text below does not show it: the positions of tokens and of rows are mixed up in transformers.
UNFIT = ("prophetnet",)


def check_suitability(
    model: PreTrainedModel, name: str, logits: Callable[[bool, int], Tensor], generate: Callable[[bool], Tensor]
) -> None:
    """Check that a model reads vectors as it reads their tokens, does not look ahead in a target, and generates.

    Args:
        model: The model.
        name: What the user calls it.
        logits: Logits ``(1, length, vocabulary)`` of a short text, by vectors or by ids, and with so many tokens of its
            end left out.
        generate: Generates from the text, by vectors or by ids.

    Raises:
        ConfigurationError: If it does not.
    """
    if model.device.type == "meta":
        return
    kind, training = f"{type(model).__name__} ({name})", model.training
    if model.config.model_type in UNFIT:
        raise ConfigurationError(
            f"{kind} predicts a token by later ones and by other rows of its batch, as transformers has it: use "
            "another family of models."
        )
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.train(False)
            read, shorter, by_ids = logits(True, 0), logits(True, 1), logits(False, 0)
            # In half precision two ways to compute the same thing differ by much more.
            limit = (1e-3 if read.dtype == torch.float32 else 0.1) * read.std()
            differ = bool((read - by_ids).abs().max() > limit)
            looks_ahead = bool((read[:, : shorter.shape[1]] - shorter).abs().max() > limit)
            generate(False), generate(True)
    except Exception as error:  # whatever a family raises for what it does not have
        raise ConfigurationError(
            f"{kind} does not take vectors in the place of tokens, or does not generate from them "
            f"({type(error).__name__}: {one_line(error)}): use another family of models, another configuration of "
            "this one, or other `inner_parameters`."
        ) from error
    finally:
        model.train(training)
    if looks_ahead:
        raise ConfigurationError(
            f"{kind} sees the tokens that it is to predict: use another family of models, or set `is_decoder` to true "
            "in its configuration if it has that."
        )
    if differ:
        raise ConfigurationError(
            f"{kind} reads tokens otherwise than their embeddings, and a learned instruction is made of embeddings: "
            "use another family of models."
        )
