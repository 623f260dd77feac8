"""What was learned, for other programs: task files, safetensors, PEFT adapters, a model of transformers."""

from diopt_lightning.export.adapter import export_adapter
from diopt_lightning.export.command import export
from diopt_lightning.export.embeddings import export_embeddings, instruction_embeddings
from diopt_lightning.export.model import export_model
from diopt_lightning.export.saved import SavedRun
from diopt_lightning.export.text import export_text

__all__ = [
    "SavedRun",
    "export",
    "export_adapter",
    "export_embeddings",
    "export_model",
    "export_text",
    "instruction_embeddings",
]
