"""Language models that take instruction embeddings."""

from diopt_lightning.backbones.base import Backbone
from diopt_lightning.backbones.causal import Causal, RandomCausal
from diopt_lightning.backbones.inner_parameters import Adapter, ByName, InnerParameters, LastLayers, LoRA
from diopt_lightning.backbones.seq2seq import RandomSeq2Seq, Seq2Seq

__all__ = [
    "Adapter",
    "Backbone",
    "ByName",
    "Causal",
    "InnerParameters",
    "LastLayers",
    "LoRA",
    "RandomCausal",
    "RandomSeq2Seq",
    "Seq2Seq",
]
