"""Learned instructions as vectors, in one safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diopt_lightning.data.files import quoted
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.export.folder import new_folder
from diopt_lightning.modules.evaluation import InstructionEvaluation

FILE = "instructions.safetensors"


def instruction_embeddings(module: InstructionEvaluation) -> dict[str, Tensor]:
    """The learned instruction of each train task, ``(length, dim)``, from a module that has been built.

    Raises:
        ConfigurationError: If the module has no instruction, or one that depends on the instance.
    """
    if module.instruction is None:
        raise ConfigurationError(
            f"This {type(module).__name__} has no `instruction`: export the model instead (`format: model`)."
        )
    embeddings = module.instruction.task_embeddings(module.backbone.embed)
    if embeddings is None:
        raise ConfigurationError(
            f"{type(module.instruction).__name__} makes an instruction for each instance, so there are no embeddings "
            "of a task to export: export the model instead (`format: model`)."
        )
    if not any(len(rows) for rows in embeddings):
        raise ConfigurationError(
            f"{type(module.instruction).__name__} puts nothing before an input, so there are no embeddings to export: "
            "export the model instead (`format: model`)."
        )
    names = [task.name for task in module.data.split_tasks("train")]
    return dict(zip(names, embeddings, strict=True))


def export_embeddings(embeddings: Mapping[str, Tensor], folder: Path, form: str, backbone: str) -> Path:
    """Write the instructions' embeddings to ``folder/instructions.safetensors``.

    The file has a tensor for each task under its name. Its metadata has ``form`` and ``backbone``, and under ``tasks``
    the names as a JSON list, in the order of training.

    Args:
        embeddings: Name of each task to its instruction ``(length, dim)``.
        folder: A new folder.
        form: The name of the instruction's class.
        backbone: The name on the hub, or folder, of the model whose input embeddings these stand among.

    Returns:
        The file's path.

    Raises:
        ConfigurationError: If the folder is not empty, or what is read again is something else.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp()) / "embeddings"
        >>> export_embeddings({"task001": torch.zeros(16, 64)}, folder, "EmbedderDP", "google/t5-base-lm-adapt").name
        'instructions.safetensors'
    """
    for name in embeddings:
        if name == "__metadata__" or name.encode("utf-8", "replace").decode() != name:
            raise ConfigurationError(
                f"The checkpoint names the task {quoted(name)}, which no tensor in a file can have."
            )
    path = folder / FILE
    metadata = {"format": "pt", "form": form, "backbone": backbone, "tasks": json.dumps(list(embeddings))}
    # Copies: safetensors refuses tensors that share memory, as rows of one matrix do.
    copies = {name: rows.detach().cpu().clone() for name, rows in embeddings.items()}
    with new_folder(folder):
        save_file(copies, path, metadata)
        found = load_file(path)
        if found.keys() != copies.keys() or not all(torch.equal(found[name], copies[name]) for name in copies):
            raise ConfigurationError(f"The vectors in {path} are not what was trained: export another `format`.")
    return path
