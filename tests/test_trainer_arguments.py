"""Every subset of Lightning's Trainer arguments: a run does what they say, or ends with one sentence."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from diopt_lightning import ConfigurationError
from tests.test_bilevel_module import HyperCleaning, loaders

ARGUMENTS: dict[str, list[Any]] = {
    "accumulate_grad_batches": [1, 2],
    "barebones": [True],
    "benchmark": [True],
    "check_val_every_n_epoch": [1, 2, None],
    "detect_anomaly": [True],
    "deterministic": [True, "warn"],
    "enable_checkpointing": [True, False],
    "enable_model_summary": [True],
    "enable_progress_bar": [True],
    "fast_dev_run": [True, 2],
    "gradient_clip_algorithm": ["norm", "value"],
    "gradient_clip_val": [0.5],
    "inference_mode": [False],
    "limit_train_batches": [0, 1, 3, 0.5],
    "limit_val_batches": [0, 1, 0.5],
    "log_every_n_steps": [0, 1, 3],
    "logger": [True, False],
    "max_epochs": [0, 1, 2],
    "max_steps": [0, 1, 5, 8],
    "max_time": [{"seconds": 30}],
    "min_epochs": [1, 2],
    "min_steps": [1, 3],
    "num_sanity_val_steps": [0, 1, -1],
    "overfit_batches": [1, 0.5],
    "precision": ["64-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed"],
    "profiler": ["simple"],
    "reload_dataloaders_every_n_epochs": [1],
    "val_check_interval": [1, 4, 0.5, 100],
}


PROFILE = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


class Validated(HyperCleaning):
    """In single precision, with a validation loop."""

    def __init__(self) -> None:
        super().__init__(inner_steps=2)
        self.float()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a batch."""
        self.log("loss", self.outer_loss(batch))


def in_single_precision(batches: Any) -> Any:
    return [[x.float() if x.is_floating_point() else x for x in batch] for batch in batches]


def run(arguments: dict[str, Any], folder: Path) -> None:
    """Train with these arguments, which work or are refused."""
    bounded = {"max_epochs", "max_steps", "fast_dev_run"} & arguments.keys()
    options = {"accelerator": "cpu", "devices": 1, "default_root_dir": str(folder)} | arguments
    module = Validated()
    levels = {level: DataLoader(in_single_precision(loader), batch_size=None) for level, loader in loaders().items()}
    refused = ""
    try:
        trainer = pl.Trainer(**({} if bounded else {"max_epochs": 1}), **options)
        trainer.fit(module, levels, levels["outer"])
    except (ConfigurationError, MisconfigurationException) as error:
        refused = str(error)
    except ValueError as error:  # Lightning's own word on its own arguments
        refused = str(error) if any(name in str(error) for name in ARGUMENTS) else "?"
    if refused:
        assert 10 < len(refused) < 500, refused
        return
    assert module.inner_steps_taken == trainer.global_step
    # A trial run takes one whatever a round is.
    assert module.outer_steps_taken == max(trainer.global_step // 2, bool(trainer.fast_dev_run))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    if trainer.max_steps >= 0:
        assert trainer.global_step <= trainer.max_steps


def check(examples: int) -> Any:
    """A property of every subset."""
    subsets = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in ARGUMENTS.items()})

    @settings(PROFILE, max_examples=examples)
    @given(subsets)
    def works_or_is_refused(arguments: dict[str, Any]) -> None:
        with TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            run(arguments, Path(folder))

    return works_or_is_refused


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_every_subset_of_the_trainers_arguments_works_or_is_refused(examples):
    check(examples)()
