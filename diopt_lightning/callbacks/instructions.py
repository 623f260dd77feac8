"""What a run learned about instructions, kept while it trains and left behind when it ends."""

import math
from typing import Any, TypeGuard

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from diopt_lightning.callbacks.results import results_folder
from diopt_lightning.data.files import write_whole
from diopt_lightning.data.long_texts import definition_ids
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.inspection import Report, page, picture
from diopt_lightning.inspection.diversity import measure, task_vectors, two_dimensional
from diopt_lightning.inspection.report import as_json, check_types, in_order
from diopt_lightning.inspection.terminal import markdown
from diopt_lightning.modules.evaluation import InstructionEvaluation


class LearnedInstructions(pl.Callback):
    """Keeps how the choices, weights and diversity of learned instructions change, and shows them when the run ends.

    After fitting there are ``instructions.json``, ``instructions.html`` and ``instructions.png`` in the folder of the
    run's logger; TensorBoard gets the table and the picture. Every logger gets the diversity at the moments that are
    kept. Checkpoints have the history too: ``diopt instructions CKPT`` shows it. Does nothing where no instruction is
    learned.

    The moments are equally far apart. Where a run turns out longer than it said, every second is dropped and the
    distance doubles: what is kept does not grow with the length of the run.

    Args:
        moments: Moments of the training to keep, at most.

    Raises:
        ConfigurationError: If ``moments`` is less than two.
    """

    def __init__(self, moments: int = 20) -> None:
        if moments < 2:
            raise ConfigurationError(f"`moments` must be 2 or more, for a start and an end, got {moments}.")
        self.limit = moments
        self.interval = 1
        self.moments: list[dict[str, Any]] = []
        self._definitions: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the start, from which a resumed run has come already."""
        if not learns(pl_module):
            return
        tokenizer = pl_module.data.tokenizer
        texts = [task.definitions[0] for task in pl_module.data.split_tasks("train")]
        rows = definition_ids(tokenizer, texts, "definitions that learned instructions are compared with")
        self._definitions = [torch.tensor(row, dtype=torch.long) for row in rows]
        if trainer.global_step == 0:
            self.moments = []
        if not self.moments:
            steps = trainer.estimated_stepping_batches  # infinite where nothing but time ends the run
            self.interval = max(1, math.ceil(steps / (self.limit - 1))) if math.isfinite(steps) else 1
            self._keep(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the moment if the last one is long enough ago."""
        if self.moments and trainer.global_step >= self.moments[-1]["step"] + self.interval and learns(pl_module):
            self._keep(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and log what was learned; here and not later, when the model has left its accelerator."""
        if not learns(pl_module):
            return
        folder = results_folder(trainer)
        # On all processes, which gather a sharded model's embeddings together.
        data = in_order(pl_module.describe_instruction() | self.report(trainer, pl_module))
        if not trainer.is_global_zero:
            return
        write_whole(folder / "instructions.json", as_json(data))
        report = Report.of(data)
        write_whole(folder / "instructions.html", page(report))
        figure = picture(report)
        if figure is not None:
            canvas = FigureCanvasAgg(figure)
            figure.savefig(folder / "instructions.png", format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("instructions", markdown(report), trainer.global_step)
                if figure is not None:  # not `add_figure`, which would draw it a second time
                    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
                    logger.experiment.add_image("instructions", pixels, trainer.global_step, dataformats="HWC")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the history beside what the module says of the present."""
        if learns(pl_module) and self.moments:
            checkpoint.setdefault("instruction", {}).update(self.report(trainer, pl_module))

    def report(self, trainer: pl.Trainer, module: InstructionEvaluation) -> dict[str, Any]:
        """Step, history and present diversity, as plain data."""
        vectors = self._vectors(module)
        diversity: dict[str, Any] | None = None
        if vectors is not None:
            learned, human, share = two_dimensional(*vectors)
            coordinates = {"learned": rounded(learned), "human": rounded(human), "share": [round(s, 4) for s in share]}
            diversity = {**measures(*vectors), "picture": coordinates}
        return {"step": trainer.global_step, "history": list(self.moments), "diversity": diversity}

    def _keep(self, trainer: pl.Trainer, module: InstructionEvaluation) -> None:
        """Keep the present, log its diversity, and drop every second moment if there are too many."""
        assert module.instruction is not None
        moment: dict[str, Any] = {"step": trainer.global_step, "learned": [], "diversity": None}
        # Describing a soft instruction compares it with the whole vocabulary, and leaves nothing to keep.
        if not self.moments or self.moments[0]["learned"]:
            numbers = [description.numbers() for description in module.learned()]
            moment["learned"] = numbers if any(numbers) else []
        vectors = self._vectors(module)
        if vectors is not None:
            moment["diversity"] = measures(*vectors)
            for logger in trainer.loggers:
                logged = {f"instructions/{name}": value for name, value in moment["diversity"]["learned"].items()}
                logger.log_metrics(logged, step=trainer.global_step)
        self.moments.append(moment)
        if len(self.moments) > self.limit:
            self.moments = self.moments[::2]
            self.interval *= 2

    @torch.no_grad()
    def _vectors(self, module: InstructionEvaluation) -> tuple[Tensor, Tensor] | None:
        """A vector of each task's learned instruction and of its definition, or ``None`` where there is none."""
        assert module.instruction is not None
        backbone = module.backbone
        learned = module.instruction.representatives(backbone.embed)
        if learned is None or not any(len(rows) for rows in learned):
            return None
        human = [backbone.embed(ids.to(backbone.embedding.weight.device)) for ids in self._definitions]
        return task_vectors(learned), task_vectors(human)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments so far, so that a resumed run's history is whole."""
        return {"moments": self.moments, "interval": self.interval}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            TypeError: If it is something else.
        """
        self.moments, self.interval = list(state_dict["moments"]), state_dict["interval"]
        learned = self.moments[-1]["learned"] if self.moments else []
        check_types(Report.of({"tasks": learned, "learned": learned, "history": self.moments}), Report)
        check_types(self.interval, int)


def learns(module: pl.LightningModule) -> TypeGuard[InstructionEvaluation]:
    """Whether there is an instruction to look at."""
    return isinstance(module, InstructionEvaluation) and module.instruction is not None


def measures(learned: Tensor, human: Tensor) -> dict[str, dict[str, float]]:
    """The diversity of both."""
    return {"learned": measure(learned), "human": measure(human)}


def rounded(points: Tensor) -> list[list[float]]:
    """Coordinates to four significant digits: they are only drawn."""
    return [[float(f"{value:.4g}") for value in point] for point in points.tolist()]
