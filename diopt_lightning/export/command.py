"""The command ``diopt export``."""

from pathlib import Path
from typing import Literal

from diopt_lightning.errors import ConfigurationError, printable
from diopt_lightning.export.adapter import export_adapter
from diopt_lightning.export.embeddings import export_embeddings
from diopt_lightning.export.model import export_model, plain_model
from diopt_lightning.export.saved import SavedRun
from diopt_lightning.export.text import export_text


def export(
    checkpoint: Path,
    folder: Path,
    *,
    format: Literal["text", "embeddings", "adapter", "model"],
    tasks: str | None = None,
    data: Path | None = None,
    config: Path | None = None,
) -> None:
    """Write what a run has learned to a folder, for other programs to read.

    What was written is read again and compared with what was trained, models and adapters on a batch.

    Args:
        checkpoint: A checkpoint of the run.
        folder: A new folder to write to.
        format: A copy of the data with the learned instructions as text; the embeddings of the instructions, in one
            safetensors file; a PEFT adapter of each task, for the exported model; or the trained model, for
            transformers.
        tasks: Write the instructions of these train tasks alone: names or patterns such as ``task1*``, separated by
            commas.
        data: The folder with the tasks; needed where it is not the one that the run was given.
        config: The configuration of the run; needed where it is not in the folder above that of the checkpoint.

    Raises:
        ConfigurationError: If an argument does not fit the checkpoint.
    """
    saved = SavedRun(checkpoint, config, data)
    if format == "model":
        if tasks is not None:
            raise ConfigurationError(f"The model is the same for all tasks: leave out `tasks`, which is {tasks}.")
        _export_model(saved, folder)
    elif format == "text":
        _export_text(saved, folder, saved.choose(tasks))
    else:
        _export_vectors(saved, folder, saved.choose(tasks), format == "adapter")
    print(printable(f"Written to {folder}"))


def _export_model(saved: SavedRun, folder: Path) -> None:
    export_model(plain_model(saved.model), saved.modules[1].tokenizer, folder)


def _export_text(saved: SavedRun, folder: Path, names: list[str]) -> None:
    learned = [description for description in saved.learned if description.task in names]
    tokenizer = saved.modules[1].tokenizer if any(description.is_soft for description in learned) else None
    root = saved.data if saved.data is not None else saved.modules[1].root
    export_text(root, folder, learned, saved.instruction["form"], tokenizer)


def _export_vectors(saved: SavedRun, folder: Path, names: list[str], adapter: bool) -> None:
    form, backbone = saved.instruction["form"], saved.instruction["backbone"]
    if adapter and not all(description.is_soft for description in saved.learned):
        raise ConfigurationError(
            f"An adapter holds the soft instruction of a task, and {form} has none: export another `format` (`text` "
            "where exemplars were chosen)."
        )
    embeddings = saved.embeddings()
    chosen = {name: embeddings[name] for name in names}
    if not adapter:
        export_embeddings(chosen, folder, form, backbone)
        return
    before = saved.modules[0].backbone.text_format(saved.modules[1].tokenizer).before
    if before:
        raise ConfigurationError(
            f"The model reads {len(before)} tokens before a learned instruction, such as the one that begins a "
            "sequence, and PEFT puts an adapter before everything: export another `format` (`embeddings`)."
        )
    export_adapter(chosen, folder, saved.instruction["encoder_decoder"], model=plain_model(saved.model))
