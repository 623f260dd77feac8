"""The benchmark for a GPU: every row runs, on the CPU in small, with the packages of a bare machine alone."""

import gc
import re
import subprocess
import sys
import weakref
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FIGURE = r"\d+\.\d{3} \(\d+\.\d{3}-\d+\.\d{3}\)"

# Modules, and the metadata by which libraries ask for them, cannot be found.
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder
modules, distributions = (set(sys.argv.pop(1).split(",")) for _ in range(2))
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in modules else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *context):
        return (found for found in PathFinder.find_distributions(*context) if found.name not in distributions)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
runpy.run_module("tests.benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def required(*names: str) -> set[str]:
    """Distributions that these need, and they themselves."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue  # something optional, or for another machine
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def run_on_a_bare_machine(*arguments: str) -> str:
    """Run the benchmark with torch, transformers, lightning, peft, this package, and what those four need."""
    kept = required("torch", "transformers", "lightning", "peft") | {"diopt-lightning"}
    installed = packages_distributions()
    modules = [module for module, of in installed.items() if not kept & {canonicalize_name(name) for name in of}]
    distributions = {name for of in installed.values() for name in of if canonicalize_name(name) not in kept}
    assert {"datasets", "jsonargparse", "matplotlib", "pytest", "rouge_score", "sentencepiece"} <= set(modules)
    command = [sys.executable, "-c", WITHOUT, ",".join(modules), ",".join(distributions), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_row_runs_on_a_bare_machine():
    output = run_on_a_bare_machine("--tiny")
    assert f"torch {torch.__version__}" in output
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line[:1] == "|"]
    assert len(table) == 2 + len(gpu.ROWS)
    assert {len(cells) for cells in table} == {11}
    for row, cells in zip(gpu.ROWS, table[2:], strict=True):
        assert cells[:4] == row.cells()
        times, memory = [cells[4], cells[6], cells[9]], [cells[5], cells[7], cells[10]]
        assert memory == ["-"] * 3  # nothing counts it on a CPU
        assert re.fullmatch(r"\d+(-\d+)?" if row.estimator else "-", cells[8])
        assert re.fullmatch(FIGURE, times[0])
        assert all(re.fullmatch(FIGURE if row.estimator else "-", cell) for cell in times[1:])


def test_rows_are_chosen_by_size_and_begun_in_time(capsys):
    assert gpu.main(["--tiny", "--sizes", "t5-xl", "t5-xxl", "--minutes", "0"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| t5")]
    assert len(lines) == sum(row.size in ("t5-xl", "t5-xxl") for row in gpu.ROWS)
    assert all(line.count("not run") == 1 for line in lines)


@pytest.mark.parametrize(
    ("error", "outcome", "fits"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "does not fit", True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "does not fit", True),
        (ValueError("another"), "failed: ValueError", False),
    ],
)
def test_a_row_that_cannot_be_measured_says_why_and_leaves_nothing(monkeypatch, capfd, error, outcome, fits):
    modules = []

    def fail(module: gpu.Measured) -> None:
        modules.append(weakref.ref(module))
        raise error.with_traceback(None)

    monkeypatch.setattr(gpu.InstructionOptimization, "_outer_step", fail)
    row = gpu.Row("t5-base", "bf16-true", "Identity")
    figures, fine = gpu.measured(row, gpu.SIZES["t5-base"].tiny(), CPU)
    assert fine is fits
    assert re.fullmatch(FIGURE, figures[0])  # the inner steps before it are there
    assert figures[1:] == ["-", outcome, "-", "-", outcome, "-"]
    assert torch.get_default_dtype() == torch.float32
    error.__traceback__ = None  # the only thing that is this test's own
    gc.collect()
    assert [module() for module in modules] == [None]
    capfd.readouterr()


def test_a_model_that_does_not_fit_has_no_figures(monkeypatch):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu.RandomSeq2Seq, "make", fail)
    figures, fine = gpu.measured(gpu.ROWS[0], gpu.SIZES["t5-base"].tiny(), CPU)
    assert fine
    assert figures.count("does not fit") == 3


def test_a_failed_row_ends_the_command_with_an_error_after_the_others(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ROWS", [gpu.Row("t5-base", "32-true", name) for name in ("Identity", "SAMA")])
    monkeypatch.setitem(gpu.ESTIMATORS, "Identity", lambda: 1 / 0)
    assert gpu.main(["--tiny"]) == 1
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| t5"))
    assert first.count("failed: ZeroDivisionError") == 3
    assert len(re.findall(FIGURE, second)) == 3


def test_the_models_are_those_that_were_published():
    published = {"t5-base": 248, "t5-large": 783, "t5-xl": 2850, "t5-xxl": 11135}  # millions of parameters
    for name, millions in published.items():
        with torch.device("meta"):
            config = gpu.transformers.AutoConfig.for_model(**gpu.SIZES[name].config())
            model = gpu.transformers.AutoModelForSeq2SeqLM.from_config(config)
            gpu.untie(model)
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == pytest.approx(millions, abs=1)
