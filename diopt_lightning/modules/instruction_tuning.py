"""Instruction tuning: the baselines."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from diopt_lightning.backbones import Backbone
from diopt_lightning.bilevel import ProcessAverage
from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.instructions import Instruction
from diopt_lightning.modules.evaluation import InstructionEvaluation
from diopt_lightning.modules.gradients import check_clip, gradient_norm
from diopt_lightning.modules.micro_batches import process_weight
from diopt_lightning.modules.parameter_groups import ParameterGroup, check_options, freeze, grouped
from diopt_lightning.modules.parameters import made_optimizer
from diopt_lightning.modules.schedules import end_with_the_run, made_scheduler
from diopt_lightning.modules.skipping import SkippedSteps
from diopt_lightning.modules.strategies import scales_losses, sharding_mesh


class InstructionTuning(InstructionEvaluation):
    r"""Plain instruction tuning: :math:`\min_{\theta, \phi} L_{train}(\theta, \phi)` by backpropagation.

    The baselines of the paper differ in the data module's ``train_prompt`` and in ``instruction``: no instruction (an
    empty prompt), the definition, definition and examples, random exemplars
    (:class:`~diopt_lightning.instructions.RandomExemplar`), and instructions that are learned without the bilevel
    structure (any learnable instruction). Validation tasks are left out, as in the bilevel run that it is compared
    with; to train on them too, set ``data.validation_tasks`` to 0.

    Optimization is Lightning's automatic one; clip (the paper: at 1.0) and accumulate by the options of a bilevel run,
    or by ``trainer.gradient_clip_val`` and ``trainer.accumulate_grad_batches``, which a bilevel run refuses. As in the
    bilevel run, several processes take the step of their global batch, whose loss is the mean over all its target
    tokens, and a step along a gradient that is not finite is skipped and counted. (Lightning counts it in
    ``trainer.global_step`` all the same.)

    Args:
        backbone: The language model theta.
        instruction: An instruction to put before the input, learned together with theta where it has parameters.
        optimizer: Makes the optimizer. Default: AdamW with learning rate 1e-5, as for the inner level.
        instruction_lr: Learning rate of the instruction's parameters. Default: 1e-2, as for the outer level.
        scheduler: Makes a learning rate scheduler that advances after every optimizer step, e.g.
            :class:`~diopt_lightning.modules.LinearWithWarmup`.
        groups: Parameters to which the optimizer applies options of their own; see
            :class:`~diopt_lightning.modules.ParameterGroup`. Default: none.
        skip_limit: Steps in a row that are skipped because the gradient is not finite, at which the run ends.
        inner_gradient_clip: Largest norm of the gradient. Default: what the trainer says.
        inner_accumulation: Batches whose gradients are averaged into one step. Default: what the trainer says.
        options: ``max_new_tokens``, ``num_beams``, ``instructed_evaluation`` and ``label_smoothing``, as in
            :class:`~diopt_lightning.InstructionOptimization`.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> from diopt_lightning.backbones import RandomSeq2Seq
        >>> module = InstructionTuning(backbone=RandomSeq2Seq({"model_type": "t5", "d_model": 64}))
    """

    def __init__(
        self,
        backbone: Backbone,
        instruction: Instruction | None = None,
        optimizer: OptimizerCallable | None = None,
        instruction_lr: float = 1e-2,
        scheduler: LRSchedulerCallable | None = None,
        groups: list[ParameterGroup] | None = None,
        skip_limit: int = 10,
        inner_gradient_clip: float | None = None,
        inner_accumulation: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, instruction, **options)
        if not instruction_lr > 0:
            raise ConfigurationError(f"`instruction_lr` must be positive, got {instruction_lr}.")
        require_at_least(1, skip_limit=skip_limit, inner_accumulation=inner_accumulation)
        check_clip("inner", inner_gradient_clip)
        # Not a default in the signature, for the reason given in BilevelModule.
        self.optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-5)
        self.instruction_lr = instruction_lr
        self.scheduler = scheduler
        self.groups = groups or []
        self.skip_limit = skip_limit
        self.inner_gradient_clip = inner_gradient_clip
        self.inner_accumulation = inner_accumulation
        self._average = ProcessAverage()
        self._skipped = SkippedSteps(skip_limit)

    def setup(self, stage: str) -> None:
        """Let the trainer clip and accumulate as the options say.

        Raises:
            ConfigurationError: If it has been told otherwise.
        """
        for option, own, left_out in (
            ("gradient_clip_val", "gradient_clip", None),
            ("accumulate_grad_batches", "accumulation", 1),
        ):
            wanted, given = getattr(self, f"inner_{own}"), getattr(self.trainer, option)
            if stage != "fit" or wanted is None:
                continue
            if given not in (left_out, wanted):
                raise ConfigurationError(
                    f"`model.inner_{own}` is {wanted} and `trainer.{option}` {given}: leave the trainer's out."
                )
            setattr(self.trainer, option, wanted)

    def configure_model(self) -> None:
        """Make the model and the instruction's parameters, and take the gradient from what is not to be learned.

        Raises:
            ConfigurationError: If the instruction or the trainer's strategy does not fit.
        """
        super().configure_model()
        freeze(self.groups, dict(self.named_parameters()))

    def on_train_start(self) -> None:
        """Let a schedule end with the run."""
        end_with_the_run(self.trainer, {None: self.trainer.estimated_stepping_batches})

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch of train tasks; an outer batch is left unused."""
        inner_batch = batch["inner"]
        loss = self.inner_loss(inner_batch)
        loss = process_weight(inner_batch.target_tokens, self._average, self.device) * loss
        (inner_loss,) = self._average([loss.detach()])
        self.log("inner_loss", inner_loss, prog_bar=True)
        return {"loss": loss, "inner_loss": inner_loss}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the optimizer no gradients, and so no step to take, where one of them is not finite."""
        if scales_losses(self.trainer):
            return  # which skips such steps itself, in search of a scale
        size = gradient_norm([parameter for group in optimizer.param_groups for parameter in group["params"]])
        if size.isfinite():
            self._skipped.taken()
            return
        optimizer.zero_grad()
        self._skipped.skip("inner", f"the norm of the inner gradient is {size.item()}.", self)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and let schedules of the instruction follow."""
        super().optimizer_step(*args, **kwargs)
        if self.instruction is not None and not self._skipped.in_a_row:
            self.instruction.advance()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer with a group of parameters for the model and one for the instruction.

        Raises:
            ConfigurationError: If the model is sharded over processes and the instruction has parameters, or a group
                does not fit.
        """
        if not self.trainer.ckpt_path:
            self._skipped = SkippedSteps(self.skip_limit)  # not those of a run before
        named = dict(self.named_parameters())
        theta = {name: p for name, p in named.items() if name.startswith("backbone.") and p.requires_grad}
        phi = {name: p for name, p in named.items() if name.startswith("instruction.")}
        if phi and sharding_mesh(self.trainer) is not None:
            raise ConfigurationError(
                f"{type(self.instruction).__name__} has parameters, whose gradients nothing averages over processes "
                "under ModelParallelStrategy: train with `ddp`, or by `InstructionOptimization`."
            )
        own: dict[str, Any] = {"lr": self.instruction_lr}
        given = grouped(self.groups, (theta, {}), (phi, own), option="groups")
        optimizer = made_optimizer("optimizer", self.optimizer, given)
        check_options(optimizer, self.groups, "groups")
        if self.scheduler is None:
            return optimizer
        scheduler = made_scheduler("scheduler", self.scheduler, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the count of skipped steps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["skipped"] = self._skipped.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added.

        Raises:
            ConfigurationError: If training cannot go on from a run of another kind.
        """
        super().on_load_checkpoint(checkpoint)
        if "skipped" in checkpoint:
            self._skipped.load_state_dict(checkpoint["skipped"])
        elif self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            raise ConfigurationError(
                f"The checkpoint is not of a run of {type(self).__name__}, which cannot go on from it: give one that "
                "such a run has saved."
            )
