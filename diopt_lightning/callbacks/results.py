"""What a run leaves behind: losses, learned instructions, metrics and predictions, in one folder."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diopt_lightning.callbacks.figures import draw_losses
from diopt_lightning.data.files import write_whole
from diopt_lightning.errors import printable
from diopt_lightning.inspection.report import as_json, check_types
from diopt_lightning.modules.evaluation import InstructionEvaluation
from diopt_lightning.modules.predictions import Prediction, official_line, official_names
from diopt_lightning.resuming.processes import of_all_processes

LOSSES = ("inner_loss", "outer_loss")


class Results(Callback):
    """Writes a run's results to the folder of its logger, and ends with a short table.

    After fitting: ``losses.csv`` and ``losses.png``, both losses over the inner steps. After testing: ``metrics.json``,
    over all, per category and per task, by our names and by those of Tk-Instruct's evaluation (``rougeL_for_TASK``,
    ``gen_len``), and ``predictions.jsonl``, which that and the leaderboard's read (of several test prompts a
    ``predictions_NAME.jsonl`` for each); after predicting, the latter.

    Args:
        table: Whether to print the table.
    """

    def __init__(self, table: bool = True) -> None:
        self.table = table
        self.losses: list[tuple[int, dict[str, float]]] = []
        self._predictions: list[Prediction] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the losses of the step."""
        # Not from the logged metrics: between two outer steps they repeat the last outer loss.
        found = {name: outputs[name].item() for name in LOSSES if isinstance(outputs, dict) and name in outputs}
        self.losses.append((trainer.global_step, found))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write losses."""
        folder = results_folder(trainer)
        if not trainer.is_global_zero or not self.losses:
            return
        lines = ["step," + ",".join(LOSSES)]
        for step, found in self.losses:
            lines.append(f"{step}," + ",".join(str(found.get(name, "")) for name in LOSSES))
        write_whole(folder / "losses.csv", "\n".join(lines) + "\n")
        draw_losses(self.losses, LOSSES, folder / "losses.png")
        rows = {}
        for name in LOSSES:
            values = [found[name] for _, found in self.losses if name in found]
            if values:
                tenth = max(1, len(values) // 10)
                first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
                rows[name] = f"{first:.3f} -> {last:.3f}"
        dev = {name: value for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("dev/")}
        rows |= {name: f"{value.item():.3f}" for name, value in dev.items()}
        self._show(f"{trainer.global_step} steps (losses: mean of the first and of the last tenth)", rows, folder)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        """Keep the predictions of the batch."""
        if isinstance(outputs, dict):
            self._predictions += outputs.get("predictions", [])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Keep the predictions of the batch."""
        if isinstance(pl_module, InstructionEvaluation):
            self._predictions += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write predictions."""
        self._write_predictions(trainer, results_folder(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write metrics and predictions."""
        folder = results_folder(trainer)
        number = self._write_predictions(trainer, folder)
        if not trainer.is_global_zero or not isinstance(pl_module, InstructionEvaluation):
            return
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        scores = pl_module.scores["test"]
        details = {f"test/{name}": value for name, value in scores.items() if not name.endswith("/all")}
        # The official evaluation has no names for several prompts.
        one = {**official_names(scores), "gen_len": metrics["test/gen_len"]} if "test/gen_len" in metrics else {}
        write_whole(folder / "metrics.json", as_json({**metrics, **details, **one}))
        self._show(f"{number:,} test instances", {k: f"{v:.3f}" for k, v in sorted(metrics.items())}, folder)

    def _write_predictions(self, trainer: Trainer, folder: Path) -> int:
        """Write the predictions of all processes as JSON lines, and return how many there are."""
        predictions = [prediction for own in of_all_processes(self._predictions) for prediction in own]
        self._predictions = []
        for prompt in {prediction.get("prompt") for prediction in predictions} if trainer.is_global_zero else ():
            rows = [prediction for prediction in predictions if prediction.get("prompt") == prompt]
            rows.sort(key=lambda prediction: (prediction["task"], prediction["id"]))
            name = f"predictions_{prompt}.jsonl" if prompt else "predictions.jsonl"
            write_whole(folder / name, "".join(as_json(official_line(row), indent=None) for row in rows))
        return len(predictions)

    def _show(self, title: str, rows: dict[str, str], folder: Path) -> None:
        if not self.table:
            return
        table = Table(title=title, title_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in rows.items():
            table.add_row(Text(printable(name)), value)
        console = Console()
        console.print(table)
        console.print(Text(printable(f"Results are in {folder}")), soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far, so that a resumed run's picture is whole."""
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.losses = [(step, found) for step, found in state_dict["losses"]]
        check_types(self.losses, list[tuple[int, dict[str, float]]])


def results_folder(trainer: Trainer) -> Path:
    """The folder of the run's logger, or its root where it has none; all processes must ask for it together."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # `log_dir` waits for the first process to say which
    folder.mkdir(parents=True, exist_ok=True)
    return folder
