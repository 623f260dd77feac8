"""All that makes a run go on: what checkpoints must hold, and how they are written whole, read and found again."""

from diopt_lightning.resuming.changed_options import KeptConfig, OptimizerOptions
from diopt_lightning.resuming.checkpoint_finding import find_checkpoint, newest_checkpoint
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint
from diopt_lightning.resuming.checkpoint_writing import WholeCheckpoints
from diopt_lightning.resuming.interruption import Interrupted, Interruption
from diopt_lightning.resuming.one_checkpoint import OneForAll
from diopt_lightning.resuming.random_state import RandomState
from diopt_lightning.resuming.run_folder import take_a_folder
from diopt_lightning.resuming.unfinished_validation import UnfinishedValidation

__all__ = [
    "Interrupted",
    "Interruption",
    "KeptConfig",
    "OneForAll",
    "OptimizerOptions",
    "RandomState",
    "UnfinishedValidation",
    "WholeCheckpoints",
    "find_checkpoint",
    "newest_checkpoint",
    "read_checkpoint",
    "take_a_folder",
]
