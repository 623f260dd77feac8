"""Hypergradients of bilevel problems in plain PyTorch: no Lightning, no transformers, no text."""

from diopt_lightning.bilevel.chebyshev import Chebyshev
from diopt_lightning.bilevel.checkpointing import checkpoint_activations
from diopt_lightning.bilevel.conjugate_gradient import ConjugateGradient
from diopt_lightning.bilevel.distributed import ProcessAverage, average_over_processes
from diopt_lightning.bilevel.double_backward import DoubleBackward
from diopt_lightning.bilevel.finite_difference import FiniteDifference
from diopt_lightning.bilevel.gauss_newton import GaussNewton
from diopt_lightning.bilevel.hypergradient import Hypergradient, HypergradientEstimator
from diopt_lightning.bilevel.identity import Identity
from diopt_lightning.bilevel.implicit import ImplicitEstimator
from diopt_lightning.bilevel.krylov import KrylovEstimator
from diopt_lightning.bilevel.minres import MinRes
from diopt_lightning.bilevel.natural import NaturalHypergradient
from diopt_lightning.bilevel.neumann import Neumann
from diopt_lightning.bilevel.nystrom import Nystrom
from diopt_lightning.bilevel.penalty import Penalty
from diopt_lightning.bilevel.problem import BilevelProblem, MicroBatches
from diopt_lightning.bilevel.products import Linearization, Product
from diopt_lightning.bilevel.reverse_over_forward import ReverseOverForward
from diopt_lightning.bilevel.sama import SAMA
from diopt_lightning.bilevel.second_order import needs_second_derivatives
from diopt_lightning.bilevel.spectrum import Spectrum
from diopt_lightning.bilevel.unrolled import Unrolled
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
    "Spectrum",
    "Unrolled",
    "average_over_processes",
    "checkpoint_activations",
    "needs_second_derivatives",
]
