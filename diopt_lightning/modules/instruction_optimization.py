"""Differentiable instruction optimization: the paper's method."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diopt_lightning.backbones import Backbone
from diopt_lightning.bilevel import HypergradientEstimator
from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions import Instruction, Relaxation
from diopt_lightning.modules.bilevel import BilevelModule
from diopt_lightning.modules.evaluation import InstructionEvaluation
from diopt_lightning.modules.strategies import check_strategy


class InstructionOptimization(BilevelModule, InstructionEvaluation):
    r"""Differentiable instruction optimization (Isonuma et al., Findings of ACL 2023).

    .. math:: \min_\phi L_{val}(\theta^*(\phi)) \quad \text{with} \quad
              \theta^*(\phi) = \arg\min_\theta L_{train}(\theta, \phi)

    :math:`L_{train}` is the loss on train tasks with the learnable instruction :math:`I_\phi` before the input,
    :math:`L_{val}` that on validation tasks with human-written instructions. Dev and test tasks are evaluated with
    human-written instructions as well: what was learned is needed for training alone.

    Args:
        backbone: The language model theta.
        instruction: The learnable instruction phi.
        hypergradient: Estimates the gradient of the validation tasks' loss with respect to phi. Default:
            :class:`~diopt_lightning.bilevel.Chebyshev` with five products. The paper's is
            :class:`~diopt_lightning.bilevel.Neumann` with one term.
        options: Those of :class:`~diopt_lightning.BilevelModule`, ``max_new_tokens``, ``num_beams``,
            ``instructed_evaluation`` and ``label_smoothing``.

    Raises:
        ConfigurationError: If an argument is out of range, or the instruction has nothing to learn.

    Example:
        >>> from diopt_lightning.backbones import RandomSeq2Seq
        >>> from diopt_lightning.instructions import EmbedderDP
        >>> module = InstructionOptimization(
        ...     backbone=RandomSeq2Seq({"model_type": "t5", "d_model": 64}),
        ...     instruction=EmbedderDP(length=16),
        ...     inner_steps=20,
        ... )
    """

    instruction: Instruction

    def __init__(
        self,
        backbone: Backbone,
        instruction: Instruction,
        hypergradient: HypergradientEstimator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(hypergradient=hypergradient, backbone=backbone, instruction=instruction, **options)

    def _begin_run(self) -> None:
        super()._begin_run()
        for part in self.instruction.modules():
            if isinstance(part, Relaxation):
                part.set_extra_state({"steps": 0})

    def setup(self, stage: str) -> None:
        """Check before anything is built that there are validation tasks, and a strategy that works.

        Raises:
            ConfigurationError: If there are none, or the strategy cannot carry the estimator.
        """
        if stage == "fit":
            check_strategy(self.trainer, self.hypergradient)
        if stage == "fit" and not self.data.splits.validation:
            raise ConfigurationError(
                "There are no validation tasks, whose loss the instructions are optimized by: set "
                f"`data.validation_tasks` above 0 (it is {self.data.validation_tasks})."
            )

    def configure_model(self) -> None:
        """Make the model and the instruction's parameters.

        Raises:
            ConfigurationError: If the instruction has none.
        """
        super().configure_model()
        names = {parameter: name for name, parameter in self.named_parameters()}
        self.inner_level.freeze(self.inner_parameters(), names)
        self.outer_level.freeze(self.outer_parameters(), names)
        if self.is_built and not self.outer_parameters():
            raise ConfigurationError(
                f"{type(self.instruction).__name__} has nothing to learn: choose another `instruction`, or train with "
                "`InstructionTuning`."
            )

    def inner_loss(self, batch: Batch) -> Tensor:
        """Loss of train tasks with learnable instructions."""
        return InstructionEvaluation.inner_loss(self, batch)

    def outer_loss(self, batch: Batch) -> Tensor:
        """Loss of validation tasks with human-written instructions."""
        return self.backbone.loss(batch)

    def batch_weight(self, batch: Batch) -> float:
        """Number of target tokens, over which losses are means."""
        return float(batch.target_tokens)

    def on_outer_step_end(self) -> None:
        """Let schedules of the instruction follow."""
        self.instruction.advance()

    def outer_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters of the instruction that are learned."""
        return [parameter for parameter in self.instruction.parameters() if parameter.requires_grad]
