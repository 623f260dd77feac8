"""What training with and without learned instructions share: how a model is built and tested."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from torchmetrics import MetricCollection

from diopt_lightning.backbones import Backbone
from diopt_lightning.backbones.frozen import add_frozen, drop_frozen
from diopt_lightning.backbones.sharding import gathered, shard
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.data.tasks import Task
from diopt_lightning.data.text_format import TextFormat
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions import Description, Instruction, InstructionEmbeddings
from diopt_lightning.metrics import ExactMatch, RougeL
from diopt_lightning.modules.strategies import sharding_mesh


class Prediction(TypedDict):
    """A line of the official predictions file, and what it is about.

    The official evaluation reads ``id`` and ``prediction``.
    """

    id: str
    prediction: str
    references: list[str]
    task: str
    category: str


class InstructionEvaluation(pl.LightningModule):
    """Builds backbone and instruction from the data module, and tests on tasks with human-written instructions.

    Subclasses set the three attributes in their constructor.

    Attributes:
        backbone: The language model.
        instruction: The learnable instruction, or ``None``.
        max_new_tokens: Tokens that are generated at most.
        instructed_evaluation: Whether dev and test tasks are given the learned instruction, before their own.
        scores: By stage (``dev``, ``test``), the metrics of the last evaluation over all, per category and per task.
    """

    backbone: Backbone
    instruction: Instruction | None
    max_new_tokens: int
    instructed_evaluation: bool
    scores: dict[str, dict[str, float]]
    _returned: Mapping[str, Any] | None = None

    @property
    def instruction_length(self) -> int:
        """Positions that the learned instruction takes from the source limit; the data module asks for it."""
        return self.instruction.length if self.instruction is not None else 0

    @property
    def text_format(self) -> TextFormat:
        """What stands around sources and targets; the data module asks for it."""
        return self.backbone.text_format(self.data.tokenizer)

    @property
    def data(self) -> NaturalInstructionsDataModule:
        """The data module of the run.

        Raises:
            ConfigurationError: If there is another one or none.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, NaturalInstructionsDataModule):
            raise ConfigurationError(
                f"{type(self).__name__} needs a NaturalInstructionsDataModule for its tasks and tokenizer, got "
                f"{type(data).__name__}: pass `datamodule=` to the trainer."
            )
        return data

    def configure_model(self) -> None:
        """Make the model and the instruction's parameters, once tasks and tokenizer are known.

        Under ``ModelParallelStrategy`` the model is sharded over the processes (FSDP2), and the instruction is not.

        Raises:
            ConfigurationError: If the instruction or the trainer's strategy does not fit.
        """
        if hasattr(self, "scores"):
            return
        mesh = sharding_mesh(self.trainer)
        self.backbone.build(self.data.tokenizer)
        self.backbone.check_lengths(self.data.max_source_length, self.data.max_target_length)
        if self.instruction is not None:
            train = self.data.split_tasks("train")
            unseen = self.data.tasks[len(train) :] if self.instructed_evaluation else []
            self._check_unseen(unseen)
            self.instruction.build(train, self.data.tokenizer, self.backbone.embedding, unseen)
        if mesh is not None:
            shard(self.backbone, mesh)
        for stage in ("dev", "test"):
            categories = {task.name: task.category for task in self.data.split_tasks(stage)}
            if categories:
                setattr(self, f"{stage}_metrics", Metrics(categories))
        self.scores = {}
        if self._returned is not None:
            self.load_state_dict(self._returned)
            self._returned = None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; where there is no model yet, keep them for when it is made.

        ``ddp_spawn`` and ``ddp_fork`` make and train it in other processes, and return its weights to this one.
        """
        if hasattr(self, "scores"):
            return super().load_state_dict(state_dict, strict, assign)
        self._returned = state_dict
        return _IncompatibleKeys([], [])

    def _check_unseen(self, unseen: Sequence[Task]) -> None:
        if unseen and self.instruction is not None and not self.instruction.works_on_unseen_tasks:
            names = [task.name for task in unseen if task.name in {*self.data.splits.dev, *self.data.splits.test}]
            raise ConfigurationError(
                f"{type(self.instruction).__name__} has no instruction for {len(names)} dev and test tasks, such as "
                f"`{names[0]}`: set `instructed_evaluation` to false, or use a form that is computed from an instance "
                "without its target (`EmbedderIC` or `ExtractorIC` with `targets: false`)."
            )

    def instruct(self, batch: Batch) -> InstructionEmbeddings | None:
        """Return the learned instruction of each instance of a dev or test batch, where they are given one."""
        if self.instruction is None or not self.instructed_evaluation:
            return None
        instruction: InstructionEmbeddings = self.instruction(batch, self.backbone.embed)
        return instruction._replace(weight=None)  # what an instance counts in training is no matter here

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was learned, to read without the data: see :meth:`describe_instruction`."""
        super().on_save_checkpoint(checkpoint)
        if self.instruction is not None:
            # A callback may have put something there already.
            checkpoint.setdefault("instruction", {}).update(self.describe_instruction())
            if self.instruction.task_parameter is not None:
                checkpoint["task_embeddings"] = f"instruction.{self.instruction.task_parameter}"
        # What is sharded goes into a checkpoint as a whole: its parts are not all at hand, to be told apart.
        if sharding_mesh(self.trainer) is None:
            drop_frozen(self.backbone, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of such a run, before its weights are loaded.

        Raises:
            ConfigurationError: If its instruction is of another form, size or list of tasks, or its model of another
                size.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("instruction", {})
        form = type(self.instruction).__name__ if self.instruction is not None else "none"
        if saved.get("form", "none") != form:
            raise ConfigurationError(
                f"The checkpoint is of a run with the instruction {saved.get('form', 'none')}, and `model.instruction` "
                f"is {form}: give the configuration that the checkpoint was written with."
            )
        if self.instruction is not None and self.instruction.has_a_row_for_each_task:
            tasks = [task.name for task in self.data.split_tasks("train")]
            differing = sorted(set(saved["tasks"]) ^ set(tasks))
            if differing or saved["tasks"] != tasks:
                what = (
                    f"`{differing[0]}` is the first of {len(differing)} that differ"
                    if differing
                    else "in another order"
                )
                raise ConfigurationError(
                    f"The checkpoint's {form} is for {len(saved['tasks'])} train tasks, and the data has {len(tasks)}; "
                    f"{what}: give the data and the splits that it was trained on."
                )
        own = self.state_dict()
        # A checkpoint of sharded weights is a folder, from which the strategy has read them already.
        for name, value in checkpoint.get("state_dict", {}).items():
            if isinstance(value, Tensor) and name in own and own[name].shape != value.shape:
                raise ConfigurationError(
                    f"`{name}` has the shape {tuple(value.shape)} in the checkpoint and {tuple(own[name].shape)} in "
                    "the model: give the configuration that the checkpoint was written with."
                )
        add_frozen(self.backbone, checkpoint)

    def describe_instruction(self) -> dict[str, Any]:
        """Return what was learned, as numbers and text alone.

        ``form`` is the instruction's class, ``backbone`` the model's name, ``encoder_decoder`` whether it is such a
        model, ``tasks`` the names of the train tasks, in the order of their rows, and ``learned`` what
        :meth:`~diopt_lightning.instructions.Instruction.describe` says of each.
        """
        assert self.instruction is not None
        return {
            "form": type(self.instruction).__name__,
            "backbone": self.backbone.name,
            "encoder_decoder": self.backbone.is_encoder_decoder,
            "tasks": [task.name for task in self.data.split_tasks("train")],
            "learned": [description.as_plain_data() for description in self.learned()],
        }

    def learned(self) -> list[Description]:
        """What :meth:`~diopt_lightning.instructions.Instruction.describe` says of each train task, on all processes."""
        assert self.instruction is not None
        with gathered(self.backbone):
            return self.instruction.describe(self.data.tokenizer, self.backbone.embedding)

    def on_validation_start(self) -> None:
        """Check that processes that share a model can run together; so do the two that follow."""
        self._check_batches(self.trainer.num_val_batches)

    def on_test_start(self) -> None:
        """Check the test tasks' batches."""
        self._check_batches(self.trainer.num_test_batches)

    def on_predict_start(self) -> None:
        """Check the batches of prediction."""
        self._check_batches(self.trainer.num_predict_batches)

    def _check_batches(self, counts: Sequence[int | float]) -> None:
        if sharding_mesh(self.trainer) is None:
            return
        own = torch.tensor(sum(counts), device=self.device)
        everywhere = sorted(cast(Tensor, self.all_gather(own)).tolist())
        if everywhere[0] != everywhere[-1]:
            # They would wait for each other's part of the model forever.
            raise ConfigurationError(
                f"Processes that share a model have {everywhere} batches to evaluate, and must have "
                "equally many: set `data.evaluation_batch_size` to 2 or more, and use no more GPUs than instances."
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch of dev tasks, which select checkpoints."""
        self._evaluate("dev", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Prediction]]:
        """Evaluate a batch of unseen test tasks."""
        return {"predictions": self._evaluate("test", batch)}

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        """Predict a batch of unseen test tasks."""
        return self._predict(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all dev tasks."""
        self._log_scores("dev")

    def on_test_epoch_end(self) -> None:
        """Log the metrics over all test tasks."""
        self._log_scores("test")

    def _evaluate(self, stage: str, batch: Batch) -> list[Prediction]:
        # Weighted by target tokens: the mean over all tokens of the stage, however they fall into batches.
        loss = self.backbone.loss(batch, self.instruct(batch))
        size = batch.target_tokens
        self.log(f"{stage}/loss", loss, batch_size=size, on_epoch=True, sync_dist=True, prog_bar=stage == "dev")
        predictions = self._predict(batch)
        getattr(self, f"{stage}_metrics").update(predictions)
        return predictions

    def _predict(self, batch: Batch) -> list[Prediction]:
        outputs = self.backbone.generate(batch, self.max_new_tokens, self.instruct(batch))
        texts = self.data.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        tasks = self.data.tasks
        predictions: list[Prediction] = []
        for text, t, i in zip(texts, batch.task.tolist(), batch.instance.tolist(), strict=True):
            task, instance = tasks[t], tasks[t].instances[i]
            predictions.append(
                {
                    "id": instance.id,
                    "prediction": text.strip(),
                    "references": list(instance.outputs),
                    "task": task.name,
                    "category": task.category,
                }
            )
        return predictions

    def _log_scores(self, stage: str) -> None:
        """Show the means over all, and hand those per category and per task to the loggers only: they are many."""
        metrics: Metrics = getattr(self, f"{stage}_metrics")
        scores = metrics.compute()
        metrics.reset()
        self.scores[stage] = {name: float(value) for name, value in scores.items()}
        for name in ("rougeL", "exact_match"):
            self.log(f"{stage}/{name}", self.scores[stage][f"{name}/all"], prog_bar=stage == "dev")
        details = {f"{stage}/{name}": value for name, value in self.scores[stage].items() if not name.endswith("/all")}
        for logger in self.loggers:
            logger.log_metrics(details, step=self.global_step)


class Metrics(MetricCollection):
    """ROUGE-L and exact match of predictions.

    Args:
        categories: The category of each task.
    """

    def __init__(self, categories: dict[str, str]) -> None:
        super().__init__({"rougeL": RougeL(categories), "exact_match": ExactMatch(categories)}, compute_groups=False)

    def update(self, predictions: Sequence[Prediction]) -> None:  # type: ignore[override]
        """Add predictions."""
        super().update(
            [prediction["prediction"] for prediction in predictions],
            [prediction["references"] for prediction in predictions],
            [prediction["task"] for prediction in predictions],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return ``METRIC/all``, ``METRIC/category/NAME`` and ``METRIC/task/NAME``."""
        return {
            f"{name}/{group}": value
            for name, metric in self.items(keep_base=True)
            for group, value in metric.compute().items()
        }
