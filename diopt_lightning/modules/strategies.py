"""Which of Lightning's strategies can carry a bilevel problem, and with what."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from diopt_lightning.bilevel import HypergradientEstimator, ImplicitEstimator, Unrolled
from diopt_lightning.errors import ConfigurationError

SHARDED = "`ModelParallelStrategy` (FSDP2) with `data_parallel_size` set to the number of GPUs and "
SHARDED += "`tensor_parallel_size` to 1"
FIRST_ORDER = "`SAMA`, `Penalty`, or `Chebyshev` and others with `FiniteDifference` as their `product`"


def sharding_mesh(trainer: Trainer) -> DeviceMesh | None:
    """The processes that a model is to be sharded over; ``None`` where the trainer's strategy leaves models whole.

    Raises:
        ConfigurationError: If the strategy would split single matrices too.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    split = strategy.device_mesh["tensor_parallel"].size()
    if split > 1:
        raise ConfigurationError(
            f"`trainer.strategy` is ModelParallelStrategy with a `tensor_parallel_size` of {split} (by default all "
            f"GPUs of a node), and no model is made for that here: set `data_parallel_size` to {trainer.world_size} "
            "and `tensor_parallel_size` to 1, which shards the model by FSDP2."
        )
    return strategy.device_mesh["data_parallel"]


def check_strategy(trainer: Trainer, estimator: HypergradientEstimator) -> None:
    """Refuse what cannot work under the trainer's strategy, and say what can.

    Raises:
        ConfigurationError: If the strategy takes one optimizer alone, or takes parameters away that the estimator
            differentiates with respect to, or shards a model that the estimator needs whole.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        raise ConfigurationError(
            "`trainer.strategy` is DeepSpeed's, which takes one optimizer, and bilevel optimization has two: use "
            f"{SHARDED} and a first-order estimator ({FIRST_ORDER}), or `ddp` where the model fits one GPU."
        )
    if isinstance(strategy, FSDPStrategy):
        raise ConfigurationError(
            "`trainer.strategy` is FSDPStrategy (FSDP1), which flattens parameters into new ones that no level knows: "
            f"use {SHARDED} and a first-order estimator ({FIRST_ORDER})."
        )
    if sharding_mesh(trainer) is None:
        return
    if not estimator.supports_sharding:
        raise ConfigurationError(
            f"{named(estimator)} cannot work under ModelParallelStrategy: a model that is sharded by FSDP2 has first "
            f"derivatives alone. Use {FIRST_ORDER}, or `ddp` where the model fits one GPU."
        )
    if trainer.precision in ("bf16-mixed", "bf16-true", "16-true"):
        raise ConfigurationError(
            f"`trainer.precision` is {trainer.precision}, and {named(estimator)} takes differences of gradients, of "
            "which half precision leaves rounding error: use `32-true`, or `ddp` with exact products."
        )


def scales_losses(trainer: Trainer) -> bool:
    """Whether the trainer's precision multiplies losses by a scale, so that small gradients survive half precision."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def refuse_loss_scaling(trainer: Trainer) -> None:
    """Refuse a precision whose scale would reach the hypergradient, and one that would need a scale.

    Raises:
        ConfigurationError: If the trainer's is one.
    """
    if trainer.precision == "16-true":
        raise ConfigurationError(
            "`trainer.precision` is 16-true, and float16 has no room for gradients and an optimizer's squares without "
            "loss scaling: use `bf16-true`, `bf16-mixed` or `32-true`."
        )
    if scales_losses(trainer):
        raise ConfigurationError(
            f"`trainer.precision` is {trainer.precision}, whose loss scaling would divide the hypergradient "
            "by the scale: use `32-true` or `bf16-mixed`."
        )


def refuse_trainers_own(trainer: Trainer) -> None:
    """Refuse the trainer's clip and accumulation, which two levels have each for themselves, in place of Lightning.

    Raises:
        ConfigurationError: If the trainer has one.
    """
    accumulated = trainer.accumulate_grad_batches
    for option, given, own in (
        ("gradient_clip_val", trainer.gradient_clip_val, "gradient_clip"),
        ("accumulate_grad_batches", accumulated if accumulated != 1 else None, "accumulation"),
    ):
        if given is not None and trainer.state.fn == TrainerFn.FITTING:
            raise ConfigurationError(
                f"`trainer.{option}` is {given}, and a bilevel run has two levels: set `model.inner_{own}` (which "
                f"`InstructionTuning` has too) and `model.outer_{own}`, and leave the trainer's out."
            )


# What to do in place of callbacks of Lightning's that cannot do their work: with two levels, and with a model that is
# made only when the data is known, which is after they have looked at its parameters.
OF_TWO_LEVELS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "set `model.inner_accumulation` and `model.outer_accumulation`",
    LearningRateFinder: "compare short runs with several learning rates of each level",
    StochasticWeightAveraging: "take `WeightAveraging` or `EMAWeightAveraging`",
}
OF_A_MODEL_TO_COME: dict[type[Callback], str] = {
    BaseFinetuning: "say what is learned by `model.backbone.inner_parameters`",
    LearningRateFinder: "compare short runs with several learning rates",
    ModelPruning: "prune the model that `diopt export` writes",
    StochasticWeightAveraging: "take `WeightAveraging` or `EMAWeightAveraging`",
}


def refuse_callbacks(trainer: Trainer, instead: Mapping[type[Callback], str]) -> None:
    """Refuse callbacks of the trainer's that would end the run with other advice, or do nothing without a word.

    Raises:
        ConfigurationError: If the trainer has one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, then in instead.items():
            if isinstance(callback, kind) and trainer.state.fn == TrainerFn.FITTING:
                raise ConfigurationError(f"{type(callback).__name__} does not work with this module: {then} instead.")


def refuse_fabric(module: LightningModule) -> None:
    """Refuse a training step under Fabric, which has no trainer to take it with.

    Raises:
        ConfigurationError: If Fabric has the module.
    """
    if module._fabric is not None:
        raise ConfigurationError(
            f"`training_step` of {type(module).__name__} takes whole steps and needs a `Trainer`. Under Fabric "
            "take the steps yourself, with the optimizers that `configure_optimizers` makes: `fabric.backward` of "
            "`inner_loss(batch)` for the inner one, and the `gradient` of `estimate_hypergradient(inner_batch, "
            "outer_batch)` as `.grad` of the `outer_parameters()` for the outer one."
        )


def refuse_underflow(optimizer: Optimizer) -> None:
    """Refuse an optimizer that divides by a number which is 0 in the precision of its parameters, as in ``16-true``.

    Raises:
        ConfigurationError: If it does.
    """
    for group in optimizer.param_groups:
        eps = group.get("eps")
        for dtype in {parameter.dtype for parameter in group["params"]}:
            if isinstance(eps, float) and eps > 0 == torch.tensor(eps, dtype=dtype).item():
                raise ConfigurationError(
                    f"`eps` of {type(optimizer).__name__} is {eps}, which is 0 in {str(dtype).removeprefix('torch.')}: "
                    "its steps would not be finite. Set it to 1.0e-4 or more, or `trainer.precision` to `bf16-true` or "
                    "`32-true`."
                )


def named(estimator: HypergradientEstimator) -> str:
    """What an estimator is, with its product where it has one."""
    name = type(estimator).__name__
    if isinstance(estimator, (ImplicitEstimator, Unrolled)):
        return f"{name} with `product` {type(estimator.product).__name__}"
    return name
