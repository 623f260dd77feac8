"""Learnable instructions: the outer parameters of the paper."""

from diopt_lightning.instructions.base import Alternatives, Instruction, InstructionEmbeddings
from diopt_lightning.instructions.candidates import CandidatePool
from diopt_lightning.instructions.embedder import EmbedderDP
from diopt_lightning.instructions.extractor import Extractor, RandomExemplar
from diopt_lightning.instructions.extractor_dp import ExtractorDP
from diopt_lightning.instructions.initialization import Definition, Initialization, Normal, Vocabulary
from diopt_lightning.instructions.relaxation import ExpectedLoss, Mixture, Relaxation, Soft, StraightThrough

__all__ = [
    "Alternatives",
    "CandidatePool",
    "Definition",
    "EmbedderDP",
    "ExpectedLoss",
    "Extractor",
    "ExtractorDP",
    "Initialization",
    "Instruction",
    "InstructionEmbeddings",
    "Mixture",
    "Normal",
    "RandomExemplar",
    "Relaxation",
    "Soft",
    "StraightThrough",
    "Vocabulary",
]
