"""Hypergradients of bilevel problems in plain PyTorch: no Lightning, no transformers, no text."""

from diopt_lightning.bilevel.distributed import ProcessAverage, average_over_processes
from diopt_lightning.bilevel.estimators.base import Hypergradient, HypergradientEstimator, mean_hypergradient
from diopt_lightning.bilevel.estimators.chebyshev import Chebyshev
from diopt_lightning.bilevel.estimators.conjugate_gradient import ConjugateGradient
from diopt_lightning.bilevel.estimators.identity import Identity
from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.estimators.krylov import KrylovEstimator
from diopt_lightning.bilevel.estimators.minres import MinRes
from diopt_lightning.bilevel.estimators.natural import NaturalHypergradient
from diopt_lightning.bilevel.estimators.neumann import Neumann
from diopt_lightning.bilevel.estimators.nystrom import Nystrom
from diopt_lightning.bilevel.estimators.penalty import Penalty
from diopt_lightning.bilevel.estimators.sama import SAMA
from diopt_lightning.bilevel.estimators.spectrum import Spectrum
from diopt_lightning.bilevel.estimators.unrolled import Unrolled
from diopt_lightning.bilevel.problem import BilevelProblem, MicroBatches
from diopt_lightning.bilevel.products.activation_checkpointing import checkpoint_activations
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.products.double_backward import DoubleBackward
from diopt_lightning.bilevel.products.finite_difference import FiniteDifference
from diopt_lightning.bilevel.products.gauss_newton import GaussNewton
from diopt_lightning.bilevel.products.reverse_over_forward import ReverseOverForward
from diopt_lightning.bilevel.products.second_order import needs_second_derivatives, second_order
from diopt_lightning.bilevel.warning import ConvergenceWarning

__all__ = [
    "SAMA",
    "BilevelProblem",
    "Chebyshev",
    "ConjugateGradient",
    "ConvergenceWarning",
    "DoubleBackward",
    "FiniteDifference",
    "GaussNewton",
    "Hypergradient",
    "HypergradientEstimator",
    "Identity",
    "ImplicitEstimator",
    "KrylovEstimator",
    "Linearization",
    "MicroBatches",
    "MinRes",
    "NaturalHypergradient",
    "Neumann",
    "Nystrom",
    "Penalty",
    "ProcessAverage",
    "Product",
    "ReverseOverForward",
    "Solution",
    "Spectrum",
    "Unrolled",
    "average_over_processes",
    "checkpoint_activations",
    "mean_hypergradient",
    "needs_second_derivatives",
    "second_order",
]
