"""Hypergradients of bilevel problems in plain PyTorch: no Lightning, no transformers, no text."""

from diopt_lightning.bilevel.distributed import average_over_processes
from diopt_lightning.bilevel.hypergradient import ConvergenceWarning, Hypergradient, HypergradientEstimator, Solution
from diopt_lightning.bilevel.neumann import Neumann
from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products import DoubleBackward, Linearization, Product

__all__ = [
    "BilevelProblem",
    "ConvergenceWarning",
    "DoubleBackward",
    "Hypergradient",
    "HypergradientEstimator",
    "Linearization",
    "Neumann",
    "Product",
    "Solution",
    "average_over_processes",
]
