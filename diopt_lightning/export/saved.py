"""A run that is over: its checkpoint, and its modules where the checkpoint is not enough."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from diopt_lightning.backbones.frozen import add_frozen
from diopt_lightning.data.datamodule import NaturalInstructionsDataModule
from diopt_lightning.data.tasks import matching_tasks
from diopt_lightning.errors import OF_A_LIBRARY, ConfigurationError, users_mistake
from diopt_lightning.export.embeddings import instruction_embeddings
from diopt_lightning.inspection.report import Report, check_types
from diopt_lightning.instructions.description import Description
from diopt_lightning.modules.evaluation import InstructionEvaluation
from diopt_lightning.rebuilding import instantiate
from diopt_lightning.resuming.checkpoint_reading import read_checkpoint, understood
from diopt_lightning.resuming.training_state import check_weights


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint, and the configuration of the run that wrote it.

    Args:
        checkpoint: The file.
        config: The run's ``config.yaml``, read only where the checkpoint is not enough. Default: the one in the run's
            folder, in which the checkpoint lies as ``checkpoints/NAME.ckpt``.
        data: The folder of the data, where it has moved since.

    Raises:
        ConfigurationError: If a file is missing or is something else; when it is asked for what needs it.
    """

    checkpoint: Path
    config: Path | None = None
    data: Path | None = None

    @cached_property
    def content(self) -> dict[str, Any]:
        """The checkpoint's content."""
        content = read_checkpoint(self.checkpoint)
        if "state_dict" not in content:
            raise ConfigurationError(
                f"{self.checkpoint} is not a checkpoint of Lightning, as it has no `state_dict`: give a `.ckpt` file "
                "that a run has saved."
            )
        return content

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights: ``backbone.*`` and ``instruction.*``."""
        state: dict[str, Tensor] = self.content["state_dict"]
        with understood(self.checkpoint):
            for name, value in state.items():
                if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
                    raise TypeError(f"`{name}` is no tensor")
        check_weights(state)
        return state

    @property
    def instruction(self) -> Mapping[str, Any]:
        """What :meth:`~diopt_lightning.modules.evaluation.InstructionEvaluation.describe_instruction` returned."""
        found = self.content.get("instruction", {})
        if not isinstance(found, dict) or "form" not in found:
            raise ConfigurationError(
                f"The checkpoint {self.checkpoint} has no learned instruction, as its run trained without one: export "
                "the model instead (`format: model`), or give another checkpoint."
            )
        with understood(self.checkpoint):
            check_types(Report.of(found), Report)
            check_types(found["tasks"], list[str])
        return found

    @property
    def learned(self) -> list[Description]:
        """What was learned for each train task."""
        form = self.instruction["form"]
        return [Description.from_plain_data(row, form) for row in self.instruction["learned"]]

    def choose(self, patterns: str | None) -> list[str]:
        """The tasks that match, or all; see :func:`~diopt_lightning.data.tasks.matching_tasks`."""
        tasks: list[str] = self.instruction["tasks"]
        return matching_tasks(tasks, patterns) if patterns is not None else tasks

    @cached_property
    def modules(self) -> tuple[InstructionEvaluation, NaturalInstructionsDataModule]:
        """The module and the data module, from the run's configuration; nothing in them is built or read yet."""
        config = self.config if self.config is not None else self.checkpoint.resolve().parents[1] / "config.yaml"
        if not config.is_file():
            raise ConfigurationError(
                f"There is no file {config}, which says how to rebuild the run of {self.checkpoint}: give the run's "
                "`config.yaml` as `config`."
            )
        cli = instantiate(config, {} if self.data is None else {"root": str(self.data)})
        module, data = cli.model, cli.datamodule
        if not isinstance(module, InstructionEvaluation) or not isinstance(data, NaturalInstructionsDataModule):
            raise ConfigurationError(
                f"{config} is of a run with {type(module).__name__} and {type(data).__name__}: give one with "
                "InstructionOptimization or InstructionTuning and a NaturalInstructionsDataModule."
            )
        return module, data

    @property
    def model(self) -> nn.Module:
        """The trained model, with its adapters if there are any."""
        module, data = self.modules
        module.backbone.build(data.tokenizer)
        self.load(module.backbone, "backbone.")
        return cast(nn.Module, module.backbone.model)

    def load(self, part: nn.Module, prefix: str) -> None:
        """Give a part of the module its trained weights.

        Args:
            part: The part, which has been built.
            prefix: What the names of its weights begin with in the checkpoint.
        """
        module, _ = self.modules
        whole = self.content | {"state_dict": self.state}
        with understood(self.checkpoint):
            add_frozen(module.backbone, whole)
        weights = {
            name.removeprefix(prefix): value for name, value in whole["state_dict"].items() if name.startswith(prefix)
        }
        advice = "give the `config.yaml` of the same run as `config`, and the data that it was trained on as `data`."
        what = f"The weights in {self.checkpoint} do not fit the configuration"
        with users_mistake(*OF_A_LIBRARY, what=what, then=advice):
            part.load_state_dict(weights)

    def embeddings(self) -> dict[str, Tensor]:
        """The instruction of each task ``(length, dim)``."""
        weight = self.state.get(str(self.content.get("task_embeddings")))
        if weight is not None:  # the instruction said that it is its embeddings as they are
            with understood(self.checkpoint):
                return dict(zip(self.instruction["tasks"], weight, strict=True))
        module, data = self.modules
        names = [task.name for task in data.split_tasks("train")]
        if names != self.instruction["tasks"]:
            raise ConfigurationError(
                f"The {len(names)} train tasks of {data.root} are not the {len(self.instruction['tasks'])} of the "
                f"checkpoint {self.checkpoint}: give the data that it was trained on as `data`."
            )
        module.configure_model()
        self.load(module, "")
        module.eval()
        return instruction_embeddings(module)
