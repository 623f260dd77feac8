"""A real pretrained causal model on the real tasks, by the shipped configuration."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_real_model_learns_on_real_tasks_in_little_memory(smollm2, real_data, tmp_path, capsys):
    arguments = [
        *("--config", str(CONFIG), f"--model.backbone.pretrained={smollm2}", f"--data.tokenizer={smollm2}"),
        *(f"--data.root={real_data}", f"--data.cache_dir={tmp_path}/cache", "--trainer.enable_progress_bar=false"),
        f"--trainer.default_root_dir={tmp_path}",
    ]
    gigabytes = diopt("fit", *arguments)
    folder = tmp_path / "lightning_logs" / "version_0"
    with (folder / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    means = {}
    for name, number in (("inner_loss", 60), ("outer_loss", 12)):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == number
        third = number // 3
        means[name] = (sum(values[:third]) / third, sum(values[-third:]) / third)
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    diopt("test", *arguments, f"--ckpt_path={checkpoint}")
    metrics = json.loads((tmp_path / "lightning_logs" / "version_1" / "metrics.json").read_text())
    with capsys.disabled():
        said = ", ".join(f"{name} {first:.2f} -> {last:.2f}" for name, (first, last) in means.items())
        print(f"\nSmolLM2: {said}; test/rougeL {metrics['test/rougeL']:.1f}; peak {gigabytes:.1f} GB", end="")
        print(f"; checkpoint {checkpoint.stat().st_size / 1e6:.0f} MB", end="")
    assert all(last < first for first, last in means.values())
    assert metrics["test/rougeL"] > 0
    assert gigabytes < 8
    assert checkpoint.stat().st_size < 100e6  # 540 MB of frozen weights are not in it
