"""What was written, read again and compared with what was trained."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from diopt_lightning.errors import ConfigurationError

# Rounding in float32 leaves about 1e-6 of the log-probabilities; another model leaves much more.
TOLERANCE = 1e-4
LENGTH = 8  # tokens of a row


@torch.no_grad()
def log_probabilities(model: nn.Module, instruction: Tensor | None = None) -> Tensor:
    """A model's log-probabilities on a batch of drawn tokens, ``(rows, length, vocabulary)``, without dropout.

    Args:
        model: A model of transformers, with adapters or without.
        instruction: Vectors ``(length, dim)`` to put before its input.
    """
    base = cast(Any, model)
    words = base.get_input_embeddings()
    drawn = torch.randint(len(words.weight), (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    ids, decoder_ids = drawn.to(words.weight.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if instruction is not None:
        rows = instruction.to(words.weight).expand(len(ids), -1, -1)
        embeddings = torch.cat([rows, words(ids)], dim=1)
        batch = {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(embeddings[..., 0])}
    if base.config.is_encoder_decoder:
        batch["decoder_input_ids"] = decoder_ids
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits: Tensor = model.forward(**batch).logits  # and not what is compiled for training
    finally:
        for module in training:
            module.training = True
    return logits[:, -LENGTH:].float().log_softmax(dim=-1)


def require_equal(exported: Tensor, trained: Tensor, what: str, remedy: str) -> None:
    """Refuse an export that computes something else than what was trained.

    Raises:
        ConfigurationError: If it does.
    """
    error = ((exported - trained).norm() / trained.norm()).item()
    if not error <= TOLERANCE:
        raise ConfigurationError(
            f"{what} is not what was trained: on a batch it differs by {error:.1e} of the whole. {remedy}"
        )
