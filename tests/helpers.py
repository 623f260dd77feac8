"""Helpers of the tests."""

from typing import Any

import lightning.pytorch as pl


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
