"""Learnable instructions: the outer parameters of the paper."""

from diopt_lightning.instructions.base import Alternatives, Instruction, InstructionEmbeddings
from diopt_lightning.instructions.candidates import CandidatePool
from diopt_lightning.instructions.composition import Composition
from diopt_lightning.instructions.conversion import Conversion, Encoding, Linear, Pooled, TokenWise, Transformer
from diopt_lightning.instructions.description import ChosenExemplar, Description
from diopt_lightning.instructions.embedder import EmbedderDP
from diopt_lightning.instructions.embedder_definition import EmbedderFromDefinition
from diopt_lightning.instructions.embedder_ic import EmbedderIC
from diopt_lightning.instructions.extractor import Extractor, RandomExemplar
from diopt_lightning.instructions.extractor_dp import ExtractorDP
from diopt_lightning.instructions.extractor_ic import ExtractorIC
from diopt_lightning.instructions.fixed_exemplar import FixedExemplar
from diopt_lightning.instructions.initialization import (
    Definition,
    Exemplar,
    Initialization,
    Normal,
    SharedInCategory,
    Vocabulary,
)
from diopt_lightning.instructions.relaxation import (
    Annealed,
    ExpectedLoss,
    GumbelStraightThrough,
    Mixture,
    Relaxation,
    Soft,
    StraightThrough,
)
from diopt_lightning.instructions.task_weights import TaskWeights

__all__ = [
    "Alternatives",
    "Annealed",
    "CandidatePool",
    "ChosenExemplar",
    "Composition",
    "Conversion",
    "Definition",
    "Description",
    "EmbedderDP",
    "EmbedderFromDefinition",
    "EmbedderIC",
    "Encoding",
    "Exemplar",
    "ExpectedLoss",
    "Extractor",
    "ExtractorDP",
    "ExtractorIC",
    "FixedExemplar",
    "GumbelStraightThrough",
    "Initialization",
    "Instruction",
    "InstructionEmbeddings",
    "Linear",
    "Mixture",
    "Normal",
    "Pooled",
    "RandomExemplar",
    "Relaxation",
    "SharedInCategory",
    "Soft",
    "StraightThrough",
    "TaskWeights",
    "TokenWise",
    "Transformer",
    "Vocabulary",
]
