"""A real pretrained causal model on the real tasks, by the shipped configuration."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diopt_lightning import InstructionOptimization
from diopt_lightning.data import NaturalInstructionsDataModule
from diopt_lightning.export import SavedRun
from tests.conftest import SHARED

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "sizes" / "smollm2_lora_cpu.yaml"
pytestmark = pytest.mark.slow

# In a process of its own, whose memory is what it reaches at its peak.
RUN = """
import resource, sys
from diopt_lightning.cli import main
code = main(sys.argv[1:])
print("peak GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, made of a package of the package index by a script that is not part of the project."""
    script = SHARED / "tools" / "make_smollm2.py"
    if not script.is_file():
        pytest.skip(f"needs {script}")
    folder = tmp_path_factory.mktemp("smollm2")
    made = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder


def diopt(*arguments: str) -> float:
    """Run a command and return its peak memory in GB."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return float(done.stdout.rsplit("peak GB", 1)[1])


@torch.no_grad()
def mean_losses(module: InstructionOptimization, data: NaturalInstructionsDataModule) -> dict[str, float]:
    """Both losses on the same batches, which a single training batch is too few of to tell what falls."""
    module.eval()
    loaders = data.train_dataloader()
    pairs = list(itertools.islice(zip(loaders["inner"], loaders["outer"], strict=False), 12))
    inner, outer = zip(*((module.inner_loss(a).item(), module.outer_loss(b).item()) for a, b in pairs), strict=True)
    return {"inner": sum(inner) / len(inner), "outer": sum(outer) / len(outer)}


def test_a_real_model_learns_on_real_tasks_in_little_memory(smollm2, real_data, tmp_path, figures):
    arguments = [
        *("--config", str(CONFIG), f"--model.backbone.pretrained={smollm2}", f"--data.tokenizer={smollm2}"),
        *(f"--data.root={real_data}", f"--data.cache_dir={tmp_path}/cache", "--trainer.enable_progress_bar=false"),
        f"--trainer.default_root_dir={tmp_path}",
    ]
    gigabytes = diopt("fit", *arguments)
    folder = tmp_path / "lightning_logs" / "version_0"
    with (folder / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [sum(bool(row[name]) for row in rows) for name in ("inner_loss", "outer_loss")] == [60, 12]
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    saved = SavedRun(checkpoint)
    module, data = saved.modules
    assert isinstance(module, InstructionOptimization)
    data.setup("fit")
    module.configure_model()
    before = mean_losses(module, data)
    saved.load(module, "")
    after = mean_losses(module, data)
    diopt("test", *arguments, f"--ckpt_path={checkpoint}")
    metrics = json.loads((tmp_path / "lightning_logs" / "version_1" / "metrics.json").read_text())
    said = ", ".join(f"{level} loss {before[level]:.2f} -> {after[level]:.2f}" for level in before)
    figures(
        f"SmolLM2: {said}; test/rougeL {metrics['test/rougeL']:.1f}; peak {gigabytes:.1f} GB; "
        f"checkpoint {checkpoint.stat().st_size / 1e6:.0f} MB"
    )
    assert all(after[level] < before[level] for level in before)
    assert metrics["test/rougeL"] > 0
    assert gigabytes < 8
    assert checkpoint.stat().st_size < 100e6  # 540 MB of frozen weights are not in it
