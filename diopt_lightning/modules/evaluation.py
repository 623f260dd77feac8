"""What training with and without learned instructions share: how a model is built and tested."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedTokenizerBase

from diopt_lightning.backbones import Backbone
from diopt_lightning.backbones.frozen import add_frozen, drop_frozen
from diopt_lightning.backbones.sharding import gathered, shard
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.data.reading import Reading
from diopt_lightning.data.splits import TaskSplits
from diopt_lightning.data.tasks import Task
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions import Description, Instruction, InstructionEmbeddings
from diopt_lightning.metrics import METRICS, TaskMetric
from diopt_lightning.modules.local_checkpoints import LocalCheckpoints
from diopt_lightning.modules.predictions import Metrics, Prediction, of_prompt, predictions_of
from diopt_lightning.modules.strategies import OF_A_MODEL_TO_COME, refuse_callbacks, sharding_mesh
from diopt_lightning.resuming.training_state import check_weights


class InstructionEvaluation(LocalCheckpoints):
    """Builds backbone and instruction from the data module, and tests on tasks with human-written instructions.

    Args:
        backbone: The language model theta.
        instruction: The learnable instruction, or ``None``.
        max_new_tokens: Tokens that are generated at most for a dev or test instance. Default: 128, the official limit.
        instructed_evaluation: Give dev and test tasks the learned instruction too, before their human-written one; only
            for forms that have one for tasks that they did not learn from. Default: no, as in the paper.
        num_beams: Beams of the search for what is generated. Default: 1 (greedy), as in the official evaluation.
        label_smoothing: Share of each target's probability that the loss of train tasks spreads evenly over the
            vocabulary; losses of all other tasks have none. Default: 0, as in the paper.

    Attributes:
        metric_classes: The metrics of dev and test tasks by name; a subclass may have others.
        is_built: Whether model and instruction have been made.
        scores: By stage (``dev``, ``test``), the metrics of the last evaluation over all, per category and per task; of
            several test prompts each behind its name.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    metric_classes: ClassVar[Mapping[str, type[TaskMetric]]] = METRICS

    def __init__(
        self,
        backbone: Backbone,
        instruction: Instruction | None = None,
        max_new_tokens: int = 128,
        instructed_evaluation: bool = False,
        label_smoothing: float = 0.0,
        num_beams: int = 1,
    ) -> None:
        super().__init__()
        require_at_least(1, max_new_tokens=max_new_tokens, num_beams=num_beams)
        if num_beams > 1 and not backbone.searches_beams:
            raise ConfigurationError(f"`num_beams` must be 1 for {type(backbone).__name__}, got {num_beams}.")
        self.num_beams = num_beams
        if not 0 <= label_smoothing < 1:
            raise ConfigurationError(f"`label_smoothing` must be at least 0 and below 1, got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        self.backbone = backbone
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens
        self.instructed_evaluation = instructed_evaluation
        self.is_built = False
        self.scores: dict[str, dict[str, float]] = {}
        self._returned: Mapping[str, Any] | None = None
        self._unchecked: dict[str, Any] | None = None

    def reading(self, tokenizer: PreTrainedTokenizerBase) -> Reading:
        """How texts are read; see :class:`~diopt_lightning.data.reading.ReadsTexts`."""
        length = self.instruction.length if self.instruction is not None else 0
        return Reading(self.backbone.text_format(tokenizer), length, self.instructed_evaluation)

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

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Refuse callbacks that would look at a model which is not there yet.

        Raises:
            ConfigurationError: If the trainer has one.
        """
        refuse_callbacks(self.trainer, OF_A_MODEL_TO_COME)
        return super().configure_callbacks()

    def configure_model(self) -> None:
        """Make the model and the instruction's parameters, once tasks and tokenizer are known.

        Under ``ModelParallelStrategy`` the model is sharded over the processes (FSDP2), and the instruction is not.

        Raises:
            ConfigurationError: If the instruction or the trainer's strategy does not fit.
        """
        if self.is_built or self._trainer is None:  # `load_from_checkpoint` asks too, and has no data
            return
        mesh = sharding_mesh(self.trainer)
        self.backbone.build(self.data.tokenizer)
        self.backbone.check_lengths(self.data.max_source_length, self.data.max_target_length)
        if self.instruction is not None:
            train = self.data.split_tasks("train")
            unseen = self.data.tasks[len(train) :] if self.instructed_evaluation else []
            check_unseen(self.instruction, unseen, self.data.splits)
            self.instruction.build(train, self.data.tokenizer, self.backbone.embedding, unseen)
        if mesh is not None:
            shard(self.backbone, mesh)
        for stage in ("dev", "test"):
            tasks = self.data.split_tasks(stage)
            for name in self.data.evaluations(stage) if tasks else ():
                setattr(self, f"{name}_metrics", Metrics(self.metric_classes, tasks))
        self.is_built = True
        if self._unchecked is not None:
            self._accept(self._unchecked)
            self._returned, self._unchecked = self._unchecked["state_dict"], None
        if self._returned is not None:
            self.load_state_dict(self._returned)
            self._returned = None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; where there is no model yet, keep them for when it is made.

        ``ddp_spawn`` and ``ddp_fork`` make and train it in other processes, and return its weights to this one; for
        ``load_from_checkpoint`` it is made when a trainer brings the data.
        """
        if self.is_built:
            return super().load_state_dict(state_dict, strict, assign)
        self._returned = state_dict
        return _IncompatibleKeys([], [])

    def inner_loss(self, batch: Batch) -> Tensor:
        """Loss of train tasks, with the instruction where there is one."""
        instruction = None if self.instruction is None else self.instruction(batch, self.backbone.embed)
        return self.backbone.loss(batch, instruction, self.label_smoothing)

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
        if self.is_built:
            self._accept(checkpoint)
        else:  # by `load_from_checkpoint`, to be built when there is a trainer with the data
            self._unchecked = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}

    def _accept(self, checkpoint: dict[str, Any]) -> None:
        self._check_instruction(checkpoint.get("instruction", {}))
        check_shapes(self.state_dict(), checkpoint)
        check_weights(checkpoint.get("state_dict", {}))
        add_frozen(self.backbone, checkpoint)

    def _check_instruction(self, saved: Mapping[str, Any]) -> None:
        form = type(self.instruction).__name__ if self.instruction is not None else "none"
        if saved.get("form", "none") != form:
            raise ConfigurationError(
                f"The checkpoint is of a run with the instruction {saved.get('form', 'none')}, and `model.instruction` "
                f"is {form}: give the configuration that the checkpoint was written with."
            )
        if self.instruction is not None and self.instruction.has_a_row_for_each_task:
            check_tasks(form, saved["tasks"], [task.name for task in self.data.split_tasks("train")])

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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch of dev tasks, which select checkpoints."""
        self._evaluate("dev", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[Prediction]]:
        """Evaluate a batch of unseen test tasks, with one of the test prompts."""
        return {"predictions": self._evaluate(self.data.evaluations("test")[dataloader_idx], batch)}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Prediction]:
        """Predict a batch of unseen test tasks, with one of the test prompts."""
        beams = {"num_beams": self.num_beams} if self.num_beams > 1 else {}
        outputs = self.backbone.generate(batch, self.max_new_tokens, self.instruct(batch), **beams)
        predictions = predictions_of(outputs, self.data.tokenizer, batch, self.data.tasks)
        return of_prompt(self.data.evaluations("test")[dataloader_idx], predictions)

    def _evaluate(self, name: str, batch: Batch) -> list[Prediction]:
        # Weighted by target tokens: the mean over all tokens of the stage, however they fall into batches.
        loss = self.backbone.loss(batch, self.instruct(batch))
        size = batch.target_tokens if bool((batch.instance >= 0).all()) else 0
        loss = loss if size else torch.zeros_like(loss)  # which may be 0 / 0
        shown: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "add_dataloader_idx": False}
        # Lightning takes the mean of sizes over the processes in whole numbers, rounded down.
        times = self.trainer.world_size
        self.log(f"{name}/loss", loss, batch_size=times * size, prog_bar=name == "dev", **shown)
        predictions = of_prompt(name, self.predict_step(batch, 0))
        length = sum(prediction["generated_tokens"] for prediction in predictions) / max(1, len(predictions))
        self.log(f"{name}/gen_len", length, batch_size=times * len(predictions), **shown)
        getattr(self, f"{name}_metrics").update(predictions)
        return predictions

    def on_validation_epoch_end(self) -> None:
        """Show the means over all, and hand those per category and per task to the loggers only: they are many."""
        stage = "test" if self.trainer.testing else "dev"
        self.scores[stage] = {}
        for evaluation in self.data.evaluations(stage):
            metrics: Metrics = getattr(self, f"{evaluation}_metrics")
            of_a_prompt = evaluation.removeprefix(stage).lstrip("/") + "/"
            scores = {f"{of_a_prompt}{name}".lstrip("/"): float(value) for name, value in metrics.compute().items()}
            self.scores[stage] |= scores
            metrics.reset()
        for name, value in self.scores[stage].items():
            if name.endswith("/all"):
                self.log(f"{stage}/{name.removesuffix('/all')}", value, prog_bar=stage == "dev")
        details = {f"{stage}/{name}": value for name, value in self.scores[stage].items() if not name.endswith("/all")}
        for logger in self.loggers:
            logger.log_metrics(details, step=self.global_step)

    on_test_epoch_end = on_validation_epoch_end


def check_unseen(instruction: Instruction, unseen: Sequence[Task], splits: TaskSplits) -> None:
    """Refuse a form that has no instruction for the tasks that it did not learn from, if it is to be evaluated on some.

    Raises:
        ConfigurationError: If it has none.
    """
    if unseen and not instruction.works_on_unseen_tasks:
        names = [task.name for task in unseen if task.name in {*splits.dev, *splits.test}]
        raise ConfigurationError(
            f"{type(instruction).__name__} has no instruction for {len(names)} dev and test tasks, such as "
            f"`{names[0]}`: set `instructed_evaluation` to false, or use a form that is computed from an instance "
            "without its target (`EmbedderIC` or `ExtractorIC` with `targets: false`)."
        )


def check_tasks(form: str, saved: Sequence[str], given: Sequence[str]) -> None:
    """Refuse a checkpoint whose rows are for other train tasks.

    Raises:
        ConfigurationError: If the tasks, or their order, differ.
    """
    differing = sorted(set(saved) ^ set(given))
    if list(saved) != list(given):
        what = f"`{differing[0]}` is the first of {len(differing)} that differ" if differing else "in another order"
        raise ConfigurationError(
            f"The checkpoint's {form} is for {len(saved)} train tasks, and the data has {len(given)}; {what}: give the "
            "data and the splits that it was trained on."
        )


def check_shapes(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights have other shapes.

    Raises:
        ConfigurationError: If one has.
    """
    # A checkpoint of sharded weights is a folder, from which the strategy has read them already.
    for name, value in checkpoint.get("state_dict", {}).items():
        if isinstance(value, Tensor) and name in own and own[name].shape != value.shape:
            raise ConfigurationError(
                f"`{name}` has the shape {tuple(value.shape)} in the checkpoint and {tuple(own[name].shape)} in "
                "the model: give the configuration that the checkpoint was written with."
            )
