"""Language models that take instruction embeddings."""

from diopt_lightning.backbones.base import Backbone
from diopt_lightning.backbones.seq2seq import Seq2Seq

__all__ = ["Backbone", "Seq2Seq"]
