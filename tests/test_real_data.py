"""The shipped configurations on the real tasks, with a small random T5 given on the command line."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from diopt_lightning.cli import main

ROOT = Path(__file__).resolve().parents[1]
SMALL_T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
pytestmark = [
    pytest.mark.slow,
    # Random weights have negative curvature, and the default step size follows it: the run says so, as it should.
    pytest.mark.filterwarnings("ignore::diopt_lightning.bilevel.ConvergenceWarning"),
]


@pytest.fixture(scope="module")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation, dev and test tasks are the same in all configurations, and tokenized once."""
    return tmp_path_factory.mktemp("token_cache")


def losses(folder: Path, name: str) -> list[float]:
    with (folder / "losses.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("config", ["extractor_dp", "embedder_dp", "definition"])
def test_trains_and_tests_on_the_real_tasks(config, real_data, t5_tokenizer, token_cache, tmp_path, figures):
    path = ROOT / "configs" / "super_natural_instructions" / f"{config}.yaml"
    arguments = [
        f"--data.root={real_data}",
        f"--data.tokenizer={t5_tokenizer}",
        f"--data.cache_dir={token_cache}",
        "--model.backbone=diopt_lightning.backbones.RandomSeq2Seq",
        f"--model.backbone.config={json.dumps(SMALL_T5)}",
        "--model.max_new_tokens=16",
        "--data.evaluation_batch_size=64",
        "--data.instances_per_task=25",  # more than the steps below take; four times as many take a minute to tokenize
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    bilevel = config != "definition"
    inner = "model.inner_optimizer" if bilevel else "model.optimizer"
    fit = [f"--{inner}.lr=3e-3", "--trainer.max_steps=50", *(["--model.inner_steps=5"] if bilevel else [])]
    assert main(["fit", "--config", str(path), *arguments, *fit]) == 0

    folder = tmp_path / "lightning_logs" / "version_0"
    for name, number in (("inner_loss", 50), ("outer_loss", 10 if bilevel else 0)):
        values = losses(folder, name)
        assert len(values) == number
        fifth = number // 5
        assert not values or sum(values[-fifth:]) < 0.95 * sum(values[:fifth])
    if bilevel:
        learned = json.loads((folder / "instructions.json").read_text())["learned"]
        assert len(learned) == 251  # 295 tasks less 30 for validation and 14 for dev

    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert main(["test", "--config", str(path), *arguments, f"--ckpt_path={checkpoint}"]) == 0
    folder = tmp_path / "lightning_logs" / "version_1"
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    listed = (real_data / "splits" / "default" / "test_tasks.txt").read_text().split()
    assert sorted({prediction["task"] for prediction in predictions}) == sorted(listed)
    assert len({prediction["id"] for prediction in predictions}) == len(predictions) == 25 * 100
    metrics = json.loads((folder / "metrics.json").read_text())
    said = {name: round(value, 3) for name, value in sorted(metrics.items()) if name.count("/") == 1}
    figures(f"{config}: {said}")
    assert all(0 <= metrics[f"test/{name}/task/{task}"] <= 100 for task in listed for name in ("rougeL", "exact_match"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] == str(checkpoint)
