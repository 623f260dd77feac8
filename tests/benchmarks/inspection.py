"""What the callback ``LearnedInstructions`` costs a run, in time and in memory.

Run ``python -m tests.benchmarks.inspection`` in the repository's root; it takes about five minutes on one core.
"""

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diopt_lightning.callbacks import LearnedInstructions, RandomState, Results
from diopt_lightning.cli import DioptCLI
from diopt_lightning.data.synthetic import WORDS, word_tokenizer
from diopt_lightning.data.tasks import Task
from diopt_lightning.inspection.diversity import measure, task_vectors, two_dimensional
from diopt_lightning.instructions import EmbedderDP
from diopt_lightning.rebuilding import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
STEPS = 100  # an epoch of the demo, which has three
HOOKS = ("on_train_start", "on_train_batch_end", "on_train_end", "on_save_checkpoint")


class Timed(LearnedInstructions):
    """The callback with a clock: seconds spent in each hook."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(HOOKS, 0.0)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in HOOKS:
            return found

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*args)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


def fit(folder: Path, *callbacks: Any) -> float:
    """Seconds that an epoch of the demo takes with these callbacks."""
    arguments = ["--config", str(ROOT / "configs" / "demo.yaml"), f"--data.root={folder / 'data'}"]
    arguments += [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={STEPS}"]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    defaults = {"callbacks": [RandomState(), Results(table=False), *callbacks]}
    cli = DioptCLI(**OPTIONS, trainer_defaults=defaults, args=without_extras(arguments), run=False)
    start = time.perf_counter()
    cli.trainer.fit(cli.model, cli.datamodule)
    return time.perf_counter() - start


def without_extras(arguments: list[str]) -> list[str]:
    """The same with no other argument of the process, about which Lightning warns."""
    sys.argv = sys.argv[:1]
    return [*arguments, "--trainer.callbacks=[]"]


def costs_of_the_demo() -> None:
    """Time epochs of the demo with and without the callback, in turn."""
    plain, timed, inside = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder))  # reads the data and warms up
        for _ in range(ROUNDS):
            callback = Timed()
            plain.append(fit(Path(folder)))
            timed.append(fit(Path(folder), callback))
            inside.append(callback.seconds)
    without, with_it = statistics.median(plain), statistics.median(timed)
    total = statistics.median(sum(seconds.values()) for seconds in inside)
    each = {name: statistics.median(seconds[name] for seconds in inside) for name in HOOKS}
    print(f"demo, {STEPS} steps: {without:.2f} s without, {with_it:.2f} s with the callback (medians of {ROUNDS})")
    print(
        f"in the callback: {total:.3f} s, {total / without:.2%} of {STEPS} steps, {total / without / 3:.2%} of the run"
    )
    print("  " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in each.items()))


def costs_of_a_large_instruction(tasks: int = 300, length: int = 64, vocabulary: int = 32_000, dim: int = 768) -> None:
    """Time what is done at a moment, at a checkpoint and at the end for 300 tasks in a large vocabulary."""
    words = word_tokenizer([*WORDS, *(f"w{index}" for index in range(vocabulary - 500))])
    embedding = nn.Embedding(vocabulary, dim)
    named = [Task(f"task{index}", ("c",), ("d",), (), (), (), "") for index in range(tasks)]
    embedder = EmbedderDP(length)
    embedder.build(named, words, embedding)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {}
    start = time.perf_counter()
    vectors = task_vectors(embedder.task_embeddings(embedding))
    measure(vectors)
    measure(vectors)
    seconds["a moment"] = time.perf_counter() - start
    start = time.perf_counter()
    two_dimensional(vectors, vectors.flip(1))
    seconds["the plane"] = time.perf_counter() - start
    start = time.perf_counter()
    embedder.describe(words, embedding)
    seconds["nearest tokens"] = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{tasks} tasks x {length} vectors of {dim}, {vocabulary:,} tokens; memory grows by {grown:.0f} MiB at most")
    print("  " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    costs_of_a_large_instruction()
    costs_of_the_demo()
