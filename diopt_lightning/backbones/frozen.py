"""Weights that are not learned and can be loaded again: a checkpoint need not hold them."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diopt_lightning.backbones.base import Backbone
from diopt_lightning.errors import ConfigurationError

PREFIX = "backbone."
# How many entries of each tensor are looked at: other weights differ nearly everywhere.
LOOKED_AT = 16


def drop_frozen(backbone: Backbone, checkpoint: dict[str, Any]) -> None:
    """Take the frozen weights of a pretrained model out of a checkpoint, and put a digest of them in.

    A checkpoint of a run with adapters is then as small as they are.

    Args:
        backbone: The checkpoint's backbone.
        checkpoint: The checkpoint, whose ``state_dict`` has the backbone's weights under ``backbone.``.
    """
    names = backbone.frozen_names()
    if names:
        weights = checkpoint["state_dict"]
        frozen = {name: weights.pop(PREFIX + name) for name in names}
        checkpoint["frozen"] = {"backbone": backbone.name, "digest": digest(frozen.items())}


def add_frozen(backbone: Backbone, checkpoint: dict[str, Any]) -> None:
    """Put back what :func:`drop_frozen` took out, from a model that has been loaded.

    Raises:
        ConfigurationError: If it is another model.
    """
    if "frozen" not in checkpoint:
        return
    names, parameters = backbone.frozen_names(), dict(backbone.named_parameters(remove_duplicate=False))
    frozen = {name: parameters[name].detach() for name in names}
    saved = checkpoint["frozen"]
    if digest(frozen.items()) != saved["digest"]:
        raise ConfigurationError(
            f"The checkpoint was trained beside the frozen weights of `{saved['backbone']}`, which it does not hold, "
            f"and `{backbone.name}` has others: give the model and the `inner_parameters` that it was trained with."
        )
    checkpoint["state_dict"] = {PREFIX + name: value for name, value in frozen.items()} | checkpoint["state_dict"]


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Digest names, shapes and some of the entries of weights, alike in every precision."""
    parts = hashlib.sha256()
    for name, tensor in weights:
        flat = tensor.flatten()
        places = torch.arange(LOOKED_AT, device=flat.device) * (len(flat) - 1) // (LOOKED_AT - 1)
        entries = flat[places].to(torch.bfloat16)
        parts.update(f"{name}{tuple(tensor.shape)}{entries.tolist()}".encode())
    return parts.hexdigest()
