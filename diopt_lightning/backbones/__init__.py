"""Language models that take instruction embeddings."""

from diopt_lightning.backbones.base import Backbone
from diopt_lightning.backbones.seq2seq import RandomSeq2Seq, Seq2Seq

__all__ = ["Backbone", "RandomSeq2Seq", "Seq2Seq"]
