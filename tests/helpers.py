"""Helpers of the tests."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from diopt_lightning.backbones.rows import compact, insert
from diopt_lightning.instructions.base import InstructionEmbeddings


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A trainer on one CPU process that writes and shows nothing unless asked to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))


def prepend(instruction: InstructionEmbeddings, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder of a backbone reads: embeddings with instructions before them, and their mask."""
    embeddings, mask = insert(instruction, embeddings, mask)
    mask, embeddings = compact(mask, embeddings)
    return embeddings, mask
