"""The controlled experiment in full: minutes a run."""

import json
from pathlib import Path

import pytest
import torch

from diopt_lightning.cli import main

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
# Runs beyond what CI has time for; their figures are in the README too.
MORE = pytest.mark.seeds


@pytest.fixture(autouse=True)
def _one_thread(_compute_small_things_on_one_thread: None) -> None:
    """The order of sums depends on the number of threads, and so do the figures of a run."""
    torch.set_num_threads(1)


def run(config: str, seed: int, root: Path, *arguments: str) -> dict[str, float]:
    """Run a shipped configuration with a seed for everything and return its test metrics."""
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed}", f"--data.tasks.seed={seed}"]
    places = [f"--trainer.default_root_dir={root}", f"--data.root={root}/data", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", str(ROOT / "configs" / config), *seeds, *places, *arguments]) == 0
    metrics: dict[str, float] = json.loads((root / "lightning_logs" / "version_0" / "metrics.json").read_text())
    return metrics


def found(root: Path) -> float:
    """Share of train tasks whose likeliest exemplar is the real one, read from the run's files and the tasks' JSON."""
    chosen = json.loads((root / "lightning_logs" / "version_0" / "instructions.json").read_text())["learned"]
    real = []
    for row in chosen:
        task = json.loads((root / "data" / "tasks" / f"{row['task']}.json").read_text())
        real.append(task["Positive Examples"][row["slots"][0]["candidate"]]["output"] != "blank")
    assert len(real) == 32
    return sum(real) / len(real)


# Among 8 candidates a batch in 300 can be more curved than the demo's fixed step size converges on. The run says so and
# goes on, as it does for a user; everywhere else in the tests this warning is an error.
@pytest.mark.filterwarnings("default::diopt_lightning.bilevel.ConvergenceWarning")
@pytest.mark.parametrize(
    ("candidates", "seed"),
    [
        pytest.param(candidates, seed, marks=() if (candidates, seed) == (4, 0) else MORE)
        for candidates in (4, 8)
        for seed in (0, 1, 2)
    ],
)
def test_the_real_exemplar_is_found(tmp_path, candidates, seed, figures):
    learned, random = tmp_path / "learned", tmp_path / "random"
    size = [f"--data.tasks.exemplars={candidates}", f"--model.instruction.candidates={candidates}"]
    with_learned = run("demo.yaml", seed, learned, *size)
    with_random = run("demo_random_exemplars.yaml", seed, random, *size)
    of_both = (
        f"{name}: learned {with_learned[name]:.3f}, random {with_random[name]:.3f}"
        for name in ("test/loss", "test/exact_match")
    )
    figures("; ".join([f"N={candidates} seed={seed}: found {found(learned):.3f}", *of_both]))  # the README's
    assert found(learned) >= 0.9
    assert with_learned["test/loss"] < 0.9 * with_random["test/loss"]
    assert with_learned["test/exact_match"] > with_random["test/exact_match"] + 5
    assert torch.isfinite(torch.tensor(list(with_learned.values()))).all()


@pytest.mark.filterwarnings("default::diopt_lightning.bilevel.ConvergenceWarning")
@MORE
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_real_exemplar_is_found_by_instance_conversion(tmp_path, seed, figures):
    metrics = run("demo_extractor_ic.yaml", seed, tmp_path)
    figures(f"IC seed={seed}: found {found(tmp_path):.3f}; test/exact_match: {metrics['test/exact_match']:.3f}")
    assert found(tmp_path) >= 0.9
    assert metrics["test/exact_match"] > 10  # random exemplars: 0 to 3, in the test above
