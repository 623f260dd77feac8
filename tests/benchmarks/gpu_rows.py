"""The rows of the benchmark for a GPU: models, precisions and estimators."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diopt_lightning.bilevel import (
    SAMA,
    Chebyshev,
    FiniteDifference,
    HypergradientEstimator,
    Identity,
    Neumann,
    Penalty,
    Spectrum,
)

# A short estimate of the spectrum: it belongs to the warm-up, and time on the device is limited.
spectrum = partial(Spectrum, products=3)
differences = partial(FiniteDifference, check=False)

ESTIMATORS: dict[str, Callable[[], HypergradientEstimator]] = {
    "Chebyshev(5)": lambda: Chebyshev(5, spectrum=spectrum()),
    "Chebyshev(5), differences": lambda: Chebyshev(5, spectrum=spectrum(), product=differences()),
    "Neumann(1)": lambda: Neumann(1, spectrum=spectrum()),
    "Neumann(1), differences": lambda: Neumann(1, spectrum=spectrum(), product=differences()),
    "Identity": Identity,
    "Identity, differences": lambda: Identity(product=differences()),
    "SAMA": SAMA,
    "Penalty(5)": lambda: Penalty(5, spectrum=spectrum()),
}

# What the column says: the trainer's precision, and PyTorch's of float32 matrix products.
PRECISIONS = {
    "32-true": ("32-true", "highest"),
    "32-true, TF32": ("32-true", "high"),
    "bf16-mixed": ("bf16-mixed", "high"),
    "bf16-true": ("bf16-true", "high"),
    "bf16 base": ("32-true", "high"),
}


@dataclass(frozen=True)
class Shape:
    """A T5 of version 1.1, how much it reads, and how often it is measured."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    inner_batch: int = 16
    outer_batch: int = 8
    rounds: int = 3
    d_kv: int = 64
    vocabulary: int = 32128
    source: int = 512
    vectors: int = 64
    target: int = 64
    inner_steps: int = 4
    tasks: int = 64

    def tiny(self) -> "Shape":
        """The same in a size for tests."""
        small = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocabulary": 64}
        short = {"inner_batch": 4, "outer_batch": 2, "source": 6, "vectors": 2, "target": 4}
        return replace(self, **small, **short, inner_steps=2, rounds=2, tasks=3)

    def config(self) -> dict[str, Any]:
        """Options of the model; what is not named is as published, such as dropout of 0.1."""
        names = ("d_model", "d_ff", "d_kv", "num_layers", "num_heads")
        shape = {name: getattr(self, name) for name in names}
        published = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        return {**published, **shape, "vocab_size": self.vocabulary}


SIZES = {
    "t5-base": Shape(768, 2048, 12, 12),
    "t5-large": Shape(1024, 2816, 24, 16),
    "t5-xl": Shape(2048, 5120, 24, 32, inner_batch=8, rounds=2),
    "t5-xxl": Shape(4096, 10240, 24, 64, inner_batch=8, rounds=2),
}


@dataclass(frozen=True)
class Row:
    """What is measured in a row of the table."""

    size: str
    precision: str
    estimator: str | None
    checkpointed: bool = False
    compiled: bool = False
    micro_batches: int = 1
    lora: bool = False

    def cells(self) -> list[str]:
        """The first cells of the row."""
        options = {
            "LoRA": self.lora,
            "checkpointed": self.checkpointed,
            "compiled": self.compiled,
            f"{self.micro_batches} micro-batches": self.micro_batches > 1,
        }
        return [self.size, self.precision, self.estimator or "-", ", ".join(o for o, used in options.items() if used)]


ROWS = [
    *(Row("t5-base", "32-true, TF32", name) for name in ("Chebyshev(5)", "Neumann(1)", "Identity")),
    Row("t5-base", "32-true, TF32", "Chebyshev(5)", checkpointed=True),
    # Without TF32: differences are the less accurate, the more is rounded.
    *(Row("t5-base", "32-true", name) for name in ("Chebyshev(5), differences", "SAMA", "Penalty(5)")),
    *(Row("t5-base", "bf16-mixed", name) for name in ("Chebyshev(5)", "Neumann(1)", "Identity")),
    Row("t5-base", "bf16-mixed", "Chebyshev(5)", checkpointed=True),
    Row("t5-large", "bf16-mixed", "Chebyshev(5)", checkpointed=True),
    Row("t5-large", "bf16-mixed", "Chebyshev(5)"),
    Row("t5-large", "bf16-mixed", "Chebyshev(5)", micro_batches=4),
    *(Row("t5-large", "bf16-mixed", name, checkpointed=True) for name in ("Neumann(1)", "Identity")),
    *(Row("t5-large", "32-true", name) for name in ("Neumann(1), differences", "SAMA")),
    *(Row("t5-xl", "bf16-true", name, checkpointed=True) for name in ("Identity", "Neumann(1)", "Chebyshev(5)")),
    Row("t5-xl", "bf16-true", "Identity"),
    # Half precision holds no difference: parameters are in float32 here.
    Row("t5-xl", "32-true, TF32", "Identity, differences", checkpointed=True),
    Row("t5-xxl", "bf16 base", "Identity", checkpointed=True, lora=True),
    Row("t5-xxl", "bf16 base", "Neumann(1)", checkpointed=True, lora=True),
    Row("t5-xxl", "bf16 base", "Chebyshev(5)", checkpointed=True, lora=True),
    Row("t5-xxl", "bf16 base", "Identity", lora=True),
    *(Row("t5-xxl", "bf16 base", name, checkpointed=True, lora=True) for name in ("SAMA", "Penalty(5)")),
    # The last of all: compiling takes longer than any other row.
    Row("t5-base", "bf16-mixed", None),
    Row("t5-base", "bf16-mixed", None, compiled=True),
]
