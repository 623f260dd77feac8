"""What training steps cost on one large GPU, in seconds and in memory, as a Markdown table.

Run ``python -m tests.benchmarks.gpu`` in the repository's root. Rows are printed as they are measured, and none is
begun after nine minutes. It needs torch, transformers, lightning and peft, and this package's metadata, which
``pip install --no-deps .`` installs. Weights and tokens are random: nothing is downloaded or read.
"""

import argparse
import gc
import logging
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diopt_lightning import InstructionOptimization
from diopt_lightning.backbones import LoRA, RandomSeq2Seq
from diopt_lightning.bilevel import ConvergenceWarning
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.synthetic import word_tokenizer
from diopt_lightning.data.tasks import Task
from diopt_lightning.instructions import EmbedderDP
from tests.benchmarks.gpu_rows import ESTIMATORS, PRECISIONS, ROWS, SIZES, Row, Shape

SEED = 0
GIB = 2**30


@dataclass(frozen=True)
class Span:
    """One measured step."""

    start: float
    end: float
    peak: int


@dataclass
class Meter:
    """Times steps and their peak memory, and waits for the device before and after each."""

    device: torch.device
    inner: list[Span] = field(default_factory=list)
    outer: list[Span] = field(default_factory=list)
    products: list[int] = field(default_factory=list)

    @contextmanager
    def step(self, spans: list[Span]) -> Iterator[None]:
        """Measure what is done in here; nothing if it fails."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        end = time.perf_counter()
        spans.append(
            Span(start, end, torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0)
        )

    def cells(self, inner_steps: int) -> list[list[str]]:
        """Figures of inner steps, outer steps and whole rounds after the first, which warms up; none of none."""
        starts = self.inner[::inner_steps]
        rounds = [
            Span(start.start, outer.end, max(outer.peak, *(span.peak for span in self.inner)))
            for start, outer in zip(starts, self.outer, strict=False)
        ]
        # Where no outer step ended, the first inner step warms up alone.
        return [cells(self.inner[inner_steps:] or self.inner[1:]), cells(self.outer[1:]), cells(rounds[1:])]


def cells(spans: Sequence[Span]) -> list[str]:
    """Median and range of the times, and the highest peak."""
    if not spans:
        return []
    times = [span.end - span.start for span in spans]
    peak = max(span.peak for span in spans)
    low, middle, high = min(times), statistics.median(times), max(times)
    return [f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{peak / GIB:.1f}" if peak else "-"]


class Measured(InstructionOptimization):
    """The paper's method on random tokens, measured.

    Args:
        shape: What stands in for the data module.
        meter: Takes the measurements.
        **options: Those of the method.
    """

    def __init__(self, shape: Shape, meter: Meter, **options: Any) -> None:
        super().__init__(**options)
        self.shape, self.meter = shape, meter
        self._data = data_of(shape)

    @property
    def data(self) -> Any:
        """What the method asks of its data module."""
        return self._data

    def configure_model(self) -> None:
        """Make the model, with a head of its own."""
        super().configure_model()
        untie(self.backbone.model)

    def _inner_step(self, batch: Any, outer_batch: Any) -> tuple[Tensor, bool]:
        with self.meter.step(self.meter.inner):
            return super()._inner_step(batch, outer_batch)

    def _outer_step(self) -> Tensor:
        with self.meter.step(self.meter.outer):
            loss = super()._outer_step()
        self.meter.products.append(int(self.trainer.callback_metrics["hypergradient/products"]))
        return loss


class Discarding(SingleDeviceStrategy):
    """One device whose model is thrown away at the end."""

    def teardown(self) -> None:
        """Spare the copy of model and optimizer to the CPU's memory."""


def untie(model: Any) -> None:
    """Give a model the head that T5 1.1 has: transformers unties it only where a file holds two matrices.

    It is scaled so that outputs are as small as a trained model's. A loss in the hundreds has no ordinary curvature.
    """
    head = model.get_output_embeddings()
    weight = head.weight.detach() * head.in_features**-0.5
    head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)


def data_of(shape: Shape) -> Any:
    """Tasks and a tokenizer without files."""
    tasks = [Task(f"task{index:03d}", ("Category",), ("Do it",), (), (), ()) for index in range(shape.tasks)]
    return SimpleNamespace(
        tokenizer=word_tokenizer(["word"]),
        max_source_length=shape.source + shape.vectors,
        max_target_length=shape.target,
        splits=SimpleNamespace(validation=["task"]),
        tasks=tasks,
        split_tasks=lambda stage: tasks if stage == "train" else [],
    )


def batches(shape: Shape, rows: int, count: int) -> list[Batch]:
    """Full rows of random tokens: no instance is shorter than it may be."""
    generator = torch.Generator().manual_seed(SEED)
    draw = partial(torch.randint, generator=generator)
    return [
        Batch(
            input_ids=draw(2, shape.vocabulary, (rows, shape.source)),
            attention_mask=torch.ones(rows, shape.source, dtype=torch.int64),
            labels=draw(2, shape.vocabulary, (rows, shape.target)),
            task=draw(shape.tasks, (rows,)),
            instance=torch.arange(rows),
        )
        for _ in range(count)
    ]


def module_of(row: Row, shape: Shape, meter: Meter) -> Measured:
    """The method as a row has it."""
    adapter = LoRA(target_modules=["q", "v"], base_dtype="bfloat16") if row.lora else None
    fused = meter.device.type == "cuda"
    steps = shape.inner_steps
    return Measured(
        shape,
        meter,
        backbone=RandomSeq2Seq(
            shape.config(),
            inner_parameters=adapter,
            activation_checkpointing=row.checkpointed,
            compile=row.compiled,
        ),
        instruction=EmbedderDP(shape.vectors),
        hypergradient=ESTIMATORS[row.estimator]() if row.estimator else None,
        # Without an estimator no outer step is reached.
        inner_steps=steps if row.estimator else steps * (shape.rounds + 2),
        inner_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=fused),
        outer_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=fused),
        micro_batches=row.micro_batches,
    )


def train(row: Row, shape: Shape, meter: Meter) -> None:
    """Train for a round that warms up and those that are measured."""
    torch.manual_seed(SEED)
    precision, matrix_products = PRECISIONS[row.precision]
    torch.set_float32_matmul_precision(matrix_products)
    steps = shape.inner_steps * (shape.rounds + 1)
    trainer = pl.Trainer(
        accelerator=meter.device.type,
        devices=1,
        strategy=Discarding(meter.device),
        precision=precision,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    load = partial(DataLoader, batch_size=None, pin_memory=meter.device.type == "cuda")
    loaders = {
        "inner": load(batches(shape, shape.inner_batch, steps)),
        "outer": load(batches(shape, shape.outer_batch, steps)),
    }
    trainer.fit(module_of(row, shape, meter), train_dataloaders=loaders)


def measured(row: Row, shape: Shape, device: torch.device) -> tuple[list[str], bool]:
    """Measure a row, whatever happens; return its figures and whether it could be measured or does not fit."""
    meter, missing, fine = Meter(device), "-", True
    try:
        train(row, shape, meter)
    except Exception as error:
        fine = out_of_memory(error)
        missing = "does not fit" if fine else f"failed: {type(error).__name__}"
        if not fine:
            traceback.print_exc()
    # Only now: the exception held the frames that hold the model.
    free()
    figures = [figure or [missing, "-"] for figure in meter.cells(shape.inner_steps)]
    return [*figures[0], *figures[1], between(meter.products[1:]), *figures[2]], fine


def between(numbers: Sequence[int]) -> str:
    """The lowest and the highest number."""
    return "-".join(str(number) for number in sorted({min(numbers), max(numbers)})) if numbers else "-"


def line(row: Row, figures: Sequence[str]) -> str:
    """A line of the table."""
    return "| " + " | ".join([*row.cells(), *figures]) + " |"


def out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was too small; libraries on the device say so in their own errors."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def free() -> None:
    """Let go of everything that a row has made or set."""
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def head(shapes: dict[str, Shape], device: torch.device) -> str:
    """What was measured on what, and the first lines of the table."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = f"{properties.name} with {properties.total_memory / GIB:.1f} GiB, {machine}"
    lengths = [
        f"- {name}: {s.inner_batch} rows in an inner batch and {s.outer_batch} in an outer one, all full: "
        f"{s.source} source tokens (and {s.vectors} learned vectors in inner batches), {s.target} target tokens; "
        f"{s.tasks} tasks; median (lowest-highest) of {s.rounds} rounds after one to warm up"
        for name, s in shapes.items()
    ]
    steps = next(iter(shapes.values())).inner_steps
    titles = ["size", "precision", "hypergradient", "options", "inner step, s", "GiB", "outer step, s", "GiB"]
    titles += ["products", f"{steps} inner and 1 outer, s", "GiB"]
    return "\n".join(
        [
            f"{date.today()}, {machine}; torch {torch.__version__} (CUDA {torch.version.cuda}), transformers "
            f"{transformers.__version__}, lightning {pl.__version__}, Python {platform.python_version()}; seed {SEED}; "
            f"PYTORCH_CUDA_ALLOC_CONF={os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}",
            "",
            *lengths,
            "- T5 1.1 with random weights and dropout 0.1; AdamW (fused) for all parameters, or for LoRA of rank 8 on "
            "queries and values beside a frozen base in bf16, with adapters in float32",
            "- products: those with second derivatives in an outer step; more than the estimator is given where its "
            "estimate of the spectrum turns out to be wrong and is made anew",
            "- GiB: highest memory allocated by tensors in the step, with weights and optimizer states",
            "- an outer step is the hypergradient and a step of its optimizer, without the estimate of the spectrum "
            "that some take every 50 steps; exact second derivatives unless `differences`; SAMA and Penalty take "
            "differences by themselves. Where activations are in bf16 those are noise: their rows say what they cost, "
            "not that they are good",
            "",
            "| " + " | ".join(titles) + " |",
            "| " + " | ".join(["---"] * len(titles)) + " |",
        ]
    )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models to measure; all")
    parser.add_argument("--tiny", action="store_true", help="all rows with a tiny model, to see that they run")
    parser.add_argument("--minutes", type=float, default=9, help="begin no row after so many minutes; 9")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure row by row; return 1 if one failed."""
    start = time.perf_counter()
    options = arguments(given)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shapes = {name: SIZES[name].tiny() if options.tiny else SIZES[name] for name in options.sizes}
    # In small on a CPU, a C++ compiler would take longer than all rows together.
    stance = "force_eager" if options.tiny and device.type == "cpu" else "default"
    print(head(shapes, device), flush=True)
    failed = False
    with warnings.catch_warnings(), torch.compiler.set_stance(stance):
        # Random weights are no minimum, and a solver may say so; loaders need no workers for tensors that are there.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", module="lightning")
        for row in (row for row in ROWS if row.size in shapes):
            if time.perf_counter() - start > 60 * options.minutes:
                print(line(row, ["not run"] + ["-"] * 6), flush=True)
                continue
            figures, fine = measured(row, shapes[row.size], device)
            print(line(row, figures), flush=True)
            failed |= not fine
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return int(failed)


if __name__ == "__main__":
    gc.freeze()  # what was imported need not be looked through after every row
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
