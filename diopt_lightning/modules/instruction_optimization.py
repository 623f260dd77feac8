"""Differentiable instruction optimization: the paper's method."""

from collections.abc import Sequence

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from diopt_lightning.backbones import Backbone
from diopt_lightning.bilevel import HypergradientEstimator
from diopt_lightning.data.collate import Batch
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.instructions import Instruction
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
        inner_steps: :math:`K`, inner optimizer steps before each outer step. Default: 1, as in the reference
            implementation.
        inner_optimizer: Makes the optimizer of theta. Default: AdamW with learning rate 1e-5.
        outer_optimizer: Makes the optimizer of phi. Default: Adam with learning rate 1e-2.
        inner_scheduler: Makes a learning rate scheduler that advances after every inner optimizer step.
        outer_scheduler: Makes a learning rate scheduler that advances after every outer optimizer step.
        inner_gradient_clip: Largest norm of the inner gradient; ``null`` for no limit. Default: 1, as in the paper.
        outer_gradient_clip: Largest norm of the hypergradient; ``null`` for no limit. Default: 1, as in the paper.
        inner_accumulation: Batches whose gradients are averaged into one inner optimizer step.
        outer_accumulation: Pairs of batches whose hypergradients are averaged into one outer step.
        micro_batches: Parts in which every batch of either level is computed, one at a time, to save memory.
        skip_limit: Steps in a row that are skipped because a loss or a gradient is not finite, at which the run ends.
        max_new_tokens: Tokens that are generated at most for a dev or test instance. Default: 128, the official limit.
        instructed_evaluation: Give dev and test tasks the learned instruction too, before their human-written one; only
            for forms that have one for tasks that they did not learn from. Default: no, as in the paper.

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

    def __init__(
        self,
        backbone: Backbone,
        instruction: Instruction,
        hypergradient: HypergradientEstimator | None = None,
        inner_steps: int = 1,
        inner_optimizer: OptimizerCallable | None = None,
        outer_optimizer: OptimizerCallable | None = None,
        inner_scheduler: LRSchedulerCallable | None = None,
        outer_scheduler: LRSchedulerCallable | None = None,
        inner_gradient_clip: float | None = 1.0,
        outer_gradient_clip: float | None = 1.0,
        inner_accumulation: int = 1,
        outer_accumulation: int = 1,
        micro_batches: int = 1,
        skip_limit: int = 10,
        max_new_tokens: int = 128,
        instructed_evaluation: bool = False,
    ) -> None:
        super().__init__(
            hypergradient=hypergradient,
            inner_steps=inner_steps,
            inner_optimizer=inner_optimizer,
            outer_optimizer=outer_optimizer,
            inner_scheduler=inner_scheduler,
            outer_scheduler=outer_scheduler,
            inner_gradient_clip=inner_gradient_clip,
            outer_gradient_clip=outer_gradient_clip,
            inner_accumulation=inner_accumulation,
            outer_accumulation=outer_accumulation,
            micro_batches=micro_batches,
            skip_limit=skip_limit,
        )
        if max_new_tokens < 1:
            raise ConfigurationError(f"`max_new_tokens` must be 1 or more, got {max_new_tokens}.")
        self.backbone = backbone
        self.instruction: Instruction = instruction
        self.max_new_tokens = max_new_tokens
        self.instructed_evaluation = instructed_evaluation

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
        if not self.outer_parameters():
            raise ConfigurationError(
                f"{type(self.instruction).__name__} has nothing to learn: choose another `instruction`, or train with "
                "`InstructionTuning`."
            )

    def inner_loss(self, batch: Batch) -> Tensor:
        """Loss of train tasks with learnable instructions."""
        return self.backbone.loss(batch, self.instruction(batch, self.backbone.embed))

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
        """Parameters of the instruction."""
        return list(self.instruction.parameters())
