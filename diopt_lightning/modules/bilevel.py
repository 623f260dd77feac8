"""The alternation: K inner steps, then one outer step, for any inner and outer loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_flatten, tree_unflatten

from diopt_lightning.bilevel import (
    BilevelProblem,
    Chebyshev,
    Hypergradient,
    HypergradientEstimator,
    MicroBatches,
    ProcessAverage,
)
from diopt_lightning.bilevel.problem import Loss
from diopt_lightning.bilevel.sharding import any_sharded
from diopt_lightning.bilevel.vectors import add, scale
from diopt_lightning.errors import ConfigurationError
from diopt_lightning.modules.skipping import OuterNorms, SkippedSteps
from diopt_lightning.modules.strategies import check_strategy
from diopt_lightning.modules.training import clip, constants, evaluation_mode, gradient_norm, share
from diopt_lightning.modules.unfinished import UnfinishedRound
from diopt_lightning.resuming.processes import of_all_processes, of_this_process
from diopt_lightning.resuming.random_numbers import drawing_from


class BilevelModule(pl.LightningModule, ABC):
    r"""Bilevel optimization of any Lightning module: override the two losses and say which parameters are outer.

    Each training step is given ``{"inner": batch, "outer": batch}`` and takes an inner step,

    .. math:: \theta \leftarrow \theta - \eta_\theta \nabla_\theta L_{train}(\theta, \phi) .

    After every ``inner_steps`` of them an outer step follows, along the hypergradient of the estimator,

    .. math:: \phi \leftarrow \phi - \eta_\phi \, dL_{val}(\theta^*(\phi), \phi) / d\phi ,

    computed from the same inner batch and its outer batch. (The reference implementation uses the batch of the *next*
    inner step; one that has just been used keeps the alternation in one place.) Outer batches of other steps are not
    used; shuffle the outer loader, so that they differ from round to round.

    Lightning counts every optimizer step in ``trainer.global_step``. Here the inner ones alone count, so that
    ``max_steps``, ``every_n_train_steps`` and schedules mean inner steps. Checkpoints hold the counters below and the
    estimator's state; both optimizers and schedulers are Lightning's business, as always.

    Args:
        hypergradient: Estimates :math:`dL_{val}/d\phi`. Default: :class:`~diopt_lightning.bilevel.Chebyshev`, which has
            no number to tune and makes the most of five products.
        inner_steps: :math:`K`, inner optimizer steps before each outer step. Default: 1, as in the reference
            implementation.
        inner_optimizer: Makes the optimizer of theta. Default: AdamW with learning rate 1e-5.
        outer_optimizer: Makes the optimizer of phi. Default: Adam with learning rate 1e-2.
        inner_scheduler: Makes a learning rate scheduler that advances after every inner optimizer step.
        outer_scheduler: Makes a learning rate scheduler that advances after every outer optimizer step.
        inner_gradient_clip: Largest norm of the inner gradient; ``null`` for no limit. Default: 1, as in the paper.
        outer_gradient_clip: Largest norm of the hypergradient; ``null`` for no limit. Default: 1, as in the paper.
        inner_accumulation: Batches whose gradients are averaged into one inner optimizer step.
        outer_accumulation: Pairs of batches whose hypergradients are averaged into one outer step: the last ones of the
            round, so at most ``inner_steps * inner_accumulation``.
        micro_batches: Parts in which every batch of either level is computed, one at a time, to save memory; the values
            are those of whole batches. See :meth:`split_batch` and :meth:`batch_weight`. Default: 1.
        skip_limit: Steps in a row that are skipped because a loss or a gradient is not finite, at which the run ends.

    Attributes:
        inner_batches_seen: Training batches so far.
        inner_steps_taken: Inner optimizer steps so far; equals ``trainer.global_step``.
        outer_steps_taken: Outer optimizer steps so far.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> class HyperCleaning(BilevelModule):  # learn the weight of each of 100 noisily labelled rows
        ...     def __init__(self):
        ...         super().__init__(inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        ...         self.model = nn.Linear(8, 1)
        ...         self.weights = nn.Parameter(torch.zeros(100))
        ...     def inner_loss(self, batch):
        ...         x, y, index = batch
        ...         return (self.weights[index].sigmoid() * (self.model(x) - y).square().squeeze(1)).mean()
        ...     def outer_loss(self, batch):
        ...         x, y = batch
        ...         return (self.model(x) - y).square().mean()
        ...     def outer_parameters(self):
        ...         return [self.weights]
        >>> len(HyperCleaning().inner_parameters())
        2
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        for name, number in {
            "inner_steps": inner_steps,
            "inner_accumulation": inner_accumulation,
            "outer_accumulation": outer_accumulation,
            "micro_batches": micro_batches,
            "skip_limit": skip_limit,
        }.items():
            if number < 1:
                raise ConfigurationError(f"`{name}` must be 1 or more, got {number}.")
        for name, limit in {"inner": inner_gradient_clip, "outer": outer_gradient_clip}.items():
            if limit is not None and not limit > 0:
                raise ConfigurationError(f"`{name}_gradient_clip` must be positive or null, got {limit}.")
        if outer_accumulation > inner_steps * inner_accumulation:
            raise ConfigurationError(
                f"`outer_accumulation` is {outer_accumulation}, and a round of {inner_steps} inner step(s) of "
                f"{inner_accumulation} batch(es) has only {inner_steps * inner_accumulation} pairs: lower it, or make "
                "the outer loader's batches larger."
            )
        # Two optimizers with steps of their own: Lightning's automatic optimization has one.
        self.automatic_optimization = False
        self.hypergradient = hypergradient if hypergradient is not None else Chebyshev()
        self.inner_steps = inner_steps
        # Not defaults in the signature: from there the parser would carry AdamW's weight decay over to an Adam that a
        # configuration names instead.
        self.inner_optimizer = inner_optimizer or partial(torch.optim.AdamW, lr=1e-5)
        self.outer_optimizer = outer_optimizer or partial(torch.optim.Adam, lr=1e-2)
        self.inner_scheduler = inner_scheduler
        self.outer_scheduler = outer_scheduler
        self.inner_gradient_clip = inner_gradient_clip
        self.outer_gradient_clip = outer_gradient_clip
        self.inner_accumulation = inner_accumulation
        self.outer_accumulation = outer_accumulation
        self.micro_batches = micro_batches
        self.inner_batches_seen = 0
        self.inner_steps_taken = 0
        self.outer_steps_taken = 0
        self._round = UnfinishedRound(inner_accumulation, outer_accumulation, self.hypergradient.recorded_steps)
        self._memory: list[Any] = []
        self._average = ProcessAverage()
        self._skipped = SkippedSteps(skip_limit)
        self._outer_norms = OuterNorms()

    @abstractmethod
    def inner_loss(self, batch: Any) -> Tensor:
        r"""Return :math:`L_{train}(\theta, \phi)` of a batch of the inner loader, a scalar."""

    @abstractmethod
    def outer_loss(self, batch: Any) -> Tensor:
        r"""Return :math:`L_{val}(\theta, \phi)` of a batch of the outer loader, a scalar."""

    @abstractmethod
    def outer_parameters(self) -> Sequence[nn.Parameter]:
        r"""Return :math:`\phi`."""

    def inner_parameters(self) -> Sequence[nn.Parameter]:
        r"""Return :math:`\theta`. Default: all parameters that require a gradient and are not outer."""
        outer = {id(parameter) for parameter in self.outer_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in outer]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Take an inner step, and an outer step where a round of ``inner_steps`` is complete.

        Returns:
            The ``inner_loss`` and, after an outer step, the ``outer_loss``, for callbacks.
        """
        inner_batch, outer_batch = self._levels(batch)
        if self._round.restore(inner_batch, outer_batch, self.device):
            self._go_on(outer_batch)
        self._round.pairs.append((inner_batch, outer_batch))
        inner_loss, stepped = self._inner_step(inner_batch, outer_batch)
        losses = {"inner_loss": inner_loss}
        if stepped and self.inner_steps_taken % self.inner_steps == 0:
            outer_loss = self._outer_step()
            if outer_loss is not None:
                losses["outer_loss"] = outer_loss
        return losses

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make both optimizers and their schedulers; the inner level comes first.

        Raises:
            ConfigurationError: If the trainer's strategy cannot carry the estimator, or a scheduler needs a metric.
        """
        if self._trainer is not None:
            # Before an optimizer meets a strategy that fails with it, and names no way out.
            check_strategy(self.trainer, self.hypergradient)
        configured: list[Any] = []
        for level in ("inner", "outer"):
            optimizer = getattr(self, f"{level}_optimizer")(getattr(self, f"{level}_parameters")())
            configured.append({"optimizer": optimizer})
            make_scheduler = getattr(self, f"{level}_scheduler")
            if make_scheduler is not None:
                scheduler = make_scheduler(optimizer)
                if isinstance(scheduler, ReduceLROnPlateau):
                    raise ConfigurationError(
                        f"`{level}_scheduler` is a ReduceLROnPlateau, which needs a metric at every step: choose a "
                        "scheduler that follows the number of steps."
                    )
                configured[-1]["lr_scheduler"] = {"scheduler": scheduler, "name": f"lr-{level}"}
        return tuple(configured)

    def on_fit_start(self) -> None:
        """Refuse what cannot work, and let all processes start from the same outer parameters.

        Raises:
            ConfigurationError: If the trainer's precision scales the loss, or outer parameters are sharded.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                f"`trainer.precision` is {self.trainer.precision}, whose loss scaling would divide the hypergradient "
                "by the scale: use `32-true` or `bf16-mixed`."
            )
        if any_sharded(self.outer_parameters()):
            raise ConfigurationError(
                "Outer parameters are sharded: call `fully_shard` on the modules of the inner level alone."
            )
        for parameter in self.outer_parameters():
            # By way of the CPU: a broadcast tensor arrives on the device that it was sent from.
            parameter.data.copy_(self.trainer.strategy.broadcast(parameter.data.cpu()))

    def on_validation_model_zero_grad(self) -> None:
        """Free gradients before validation, unless they are those of the batches of an unfinished inner step."""
        if self.inner_batches_seen % self.inner_accumulation == 0:
            super().on_validation_model_zero_grad()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Keep the outer parameters out of DDP's reducer, which otherwise waits for their gradients in inner steps.

        ``DistributedDataParallel`` reads this attribute of the module that it wraps.
        """
        outer = {id(parameter) for parameter in self.outer_parameters()}
        names = [name for name, parameter in self.named_parameters(remove_duplicate=False) if id(parameter) in outer]
        # One of DDP's two look-ups joins a module's name and the parameter's by a dot; the module itself has no name.
        return [*names, *(f".{name}" for name in names)]

    def _levels(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, dict) or not {"inner", "outer"} <= batch.keys():
            found = f"the keys {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
            raise ConfigurationError(
                f"A bilevel training step needs {{'inner': batch, 'outer': batch}}, got {found}: pass "
                "`{'inner': inner_loader, 'outer': outer_loader}` as the training data loaders."
            )
        return batch["inner"], batch["outer"]

    def _inner_step(self, batch: Any, outer_batch: Any) -> tuple[Tensor, bool]:
        """Accumulate a gradient of the inner loss; return the loss and whether the optimizer took a step."""
        optimizer = self.optimizers()[0]  # type: ignore[index]
        if self.inner_batches_seen % self.inner_accumulation == 0:
            self._round.begin_step(self.device)
        self._round.inner_batches.append(batch)
        self.inner_batches_seen += 1
        complete = self.inner_batches_seen % self.inner_accumulation == 0
        loss = self._accumulate(batch, complete)
        self.log("inner_loss", loss, prog_bar=True)
        if not complete:
            return loss, False
        norm = gradient_norm(self.inner_parameters())
        if not norm.isfinite():
            optimizer.zero_grad()
            self._round.forget_step()
            self._skip("inner", f"the norm of the inner gradient is {norm.item()}.")
            return loss, False
        self._round.steps.append(list(self._round.inner_batches))
        self.hypergradient.observe(self.problem(list(self._round.inner_batches), outer_batch))
        clip(self.inner_parameters(), norm, self.inner_gradient_clip)
        self.log("inner_gradient_norm", norm)
        optimizer.step()
        optimizer.zero_grad()
        self._advance_scheduler("inner")
        self.inner_steps_taken += 1
        self._skipped.taken()
        return loss, True

    def _accumulate(self, batch: Any, complete: bool) -> Tensor:
        """Add the gradient of the inner loss, one micro-batch at a time, to that of the inner step; return the loss."""
        parts, factor = self._parts(batch), self._share(batch)
        total = torch.zeros((), device=self.device)
        for number, (part, weight) in enumerate(parts, start=1):
            # Processes exchange gradients once a step, with the last backward pass.
            with constants(self.outer_parameters()), self._exchange(complete and number == len(parts)):
                loss = factor * weight * self.inner_loss(part)
                self.manual_backward(loss / self.inner_accumulation)
            total = total + loss.detach()
        (mean,) = self._average([total])
        return mean

    def _go_on(self, outer_batch: Any) -> None:
        """Bring the first batch after an interruption to where the batches before it, of the same round, had come."""
        problems = [self.problem(batches, outer_batch) for batches in self._round.steps]
        self.hypergradient.restore_recorded(self._memory, [problem.inner_loss for problem in problems])
        self._memory = []
        if not self._round.inner_batches:
            return
        assert self._round.random is not None
        # As in a model's running means, which have seen these batches already.
        buffers = [buffer.clone() for buffer in self.buffers()]
        with drawing_from(self._round.random, self.device):
            for batch in self._round.inner_batches:
                self._accumulate(batch, complete=False)
        for buffer, value in zip(self.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def _exchange(self, now: bool) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) and not now else nullcontext()

    def _skip(self, level: str, why: str) -> None:
        self._skipped.skip(level, why, self.trainer)
        self.log(f"skipped_{level}_steps", float(self._skipped.total[level]))

    def _outer_step(self) -> Tensor | None:
        """Move the outer parameters along the hypergradient of the last pairs of batches.

        Returns:
            The outer loss; ``None`` where something was not finite, and no step was taken.
        """
        # The plain optimizer: a step of Lightning's wrapper would count in `trainer.global_step`.
        optimizer = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
        parameters = list(self.outer_parameters())
        pairs, sent = list(self._round.pairs), self._average.bytes
        self._round.pairs.clear()
        try:
            estimates = [self.estimate_hypergradient(*pair) for pair in pairs]
        except FloatingPointError as error:
            self._skip("outer", str(error))
            return None
        gradient = estimates[0].gradient
        for estimate in estimates[1:]:
            gradient = add(gradient, estimate.gradient)
        for parameter, entry in zip(parameters, scale(gradient, 1 / len(estimates)), strict=True):
            parameter.grad = entry.to(parameter.dtype)
        norm = gradient_norm(parameters)
        if not norm.isfinite():
            optimizer.zero_grad()
            self._skip("outer", f"the norm of the hypergradient is {norm.item()}.")
            return None
        self._outer_norms.see(norm.item())
        clip(parameters, norm, self.outer_gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        self._advance_scheduler("outer")
        self.outer_steps_taken += 1
        self._skipped.taken()
        self.on_outer_step_end()
        (loss,) = self._average([torch.stack([estimate.outer_loss for estimate in estimates]).mean()])
        self.log("outer_loss", loss, prog_bar=True)
        if self.trainer.world_size > 1:
            self.log("hypergradient/bytes", float(self._average.bytes - sent))
        self.log("hypergradient/norm", norm)
        for name in sorted(set[str]().union(*(estimate.statistics for estimate in estimates))):
            values = [estimate.statistics[name] for estimate in estimates if name in estimate.statistics]
            self.log(f"hypergradient/{name}", sum(values) / len(values))
        return loss

    def on_outer_step_end(self) -> None:
        """Called after every step of the outer optimizer; override it for what follows the outer parameters."""

    def estimate_hypergradient(self, inner_batch: Any, outer_batch: Any) -> Hypergradient:
        """Estimate the hypergradient at the current parameters, with dropout off.

        Dropout that is drawn anew in every product would be a different system in each of them.
        """
        with evaluation_mode(self):
            return self.hypergradient(self.problem([inner_batch], outer_batch))

    def problem(self, inner_batches: Sequence[Any], outer_batch: Any) -> BilevelProblem:
        """Return the bilevel problem of these batches at the current parameters, for the engine."""
        attached = self._trainer is not None or self._fabric is not None
        return BilevelProblem(
            inner_loss=self._in_parts(self.inner_loss, inner_batches),
            outer_loss=self._in_parts(self.outer_loss, [outer_batch]),
            inner_parameters=self.inner_parameters(),
            outer_parameters=self.outer_parameters(),
            average=self._average,
            inner_optimizer=self.optimizers(use_pl_optimizer=False)[0] if attached else None,  # type: ignore[index]
            inner_gradient_clip=self.inner_gradient_clip,
        )

    def _in_parts(self, loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> Loss | MicroBatches:
        """The mean of a loss over batches, each computed in micro-batches."""
        parts: list[Loss] = []
        weights: list[float] = []
        for batch in batches:
            factor = self._share(batch)
            for part, weight in self._parts(batch):
                parts.append(partial(scaled, loss, part, factor))
                weights.append(weight)
        return parts[0] if len(parts) == 1 else MicroBatches(parts, weights)

    def _parts(self, batch: Any) -> list[tuple[Any, float]]:
        """The micro-batches of a batch, and what share of its loss each is; the shares sum to one."""
        if self.micro_batches == 1:
            return [(batch, 1.0)]
        parts = self.split_batch(batch, self.micro_batches)
        sizes = [self.batch_weight(part) for part in parts]
        return [(part, size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)]

    def _share(self, batch: Any) -> float:
        return share(self.batch_weight(batch), self._average, self.device)

    def split_batch(self, batch: Any, parts: int) -> list[Any]:
        """Split a batch into at most so many parts, each a batch; override it for batches of another make.

        Default: all tensors in the batch are split along their first dimension.

        Raises:
            ConfigurationError: If there is no tensor to split, or they differ in length.
        """
        leaves, structure = tree_flatten(batch)
        lengths = {len(leaf) if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigurationError(
                f"`micro_batches` is {parts}, and a batch can be split only if its tensors are of one length, got "
                f"{sorted(lengths)}: override `split_batch`, or set `micro_batches` to 1."
            )
        columns = [leaf.chunk(parts) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        count = next(len(column) for column in columns if isinstance(column, tuple))
        return [
            tree_unflatten([column[index] if isinstance(column, tuple) else column for column in columns], structure)
            for index in range(count)
        ]

    def batch_weight(self, batch: Any) -> float:
        """What a loss of the batch is the mean over; override it where that is not rows. Default: rows.

        It weighs micro-batches, and the batches of processes where they differ.
        """
        rows = (len(leaf) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim() > 0)
        return float(next(rows, 1))

    def _advance_scheduler(self, level: str) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.name == f"lr-{level}":
                config.scheduler.step()  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters, the estimator's state and what will still be used of an unfinished round."""
        super().on_save_checkpoint(checkpoint)
        steps_to_come = self.inner_steps - self.inner_steps_taken % self.inner_steps
        accumulated = self.inner_batches_seen % self.inner_accumulation
        pairs_to_come = steps_to_come * self.inner_accumulation - accumulated
        remembered = max(0, self.hypergradient.recorded_steps - steps_to_come)
        memory = self.hypergradient.recorded_state(remembered)
        unfinished = self._round.state(accumulated, max(0, self.outer_accumulation - pairs_to_come), remembered)
        checkpoint["bilevel"] = {
            "inner_batches_seen": self.inner_batches_seen,
            "inner_steps_taken": self.inner_steps_taken,
            "outer_steps_taken": self.outer_steps_taken,
            "estimator": type(self.hypergradient).__name__,
            "hypergradient": self.hypergradient.state_dict(),
            "skipped": self._skipped.state_dict(),
            # Of a sharded model, each process remembers its own shards.
            "memory": of_all_processes(memory) if any_sharded(self.inner_parameters()) else [memory],
            "round": of_all_processes(unfinished),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added.

        Raises:
            ConfigurationError: If there is nothing of the kind, or the state is that of another estimator.
        """
        super().on_load_checkpoint(checkpoint)
        if "bilevel" not in checkpoint:
            raise ConfigurationError(
                f"The checkpoint is not of a bilevel run, and {type(self).__name__} cannot go on from it: give one "
                "that such a run has saved."
            )
        state = checkpoint["bilevel"]
        estimator = type(self.hypergradient).__name__
        if state["estimator"] != estimator:
            raise ConfigurationError(
                f"The checkpoint has the state of {state['estimator']}, and `model.hypergradient` is {estimator}: "
                "give the configuration that the checkpoint was written with."
            )
        self.inner_batches_seen = state["inner_batches_seen"]
        self.inner_steps_taken = state["inner_steps_taken"]
        self.outer_steps_taken = state["outer_steps_taken"]
        self.hypergradient.load_state_dict(state["hypergradient"])
        self._skipped.load_state_dict(state["skipped"])
        memories = state["memory"]
        self._memory = (memories[0] if len(memories) == 1 else of_this_process(memories)) or []
        self._round.load(of_this_process(state["round"]))


def scaled(loss: Callable[[Any], Tensor], batch: Any, factor: float) -> Tensor:
    """A multiple of the loss of a batch; the loss itself where the factor is one, whatever it is."""
    return loss(batch) if factor == 1.0 else factor * loss(batch)
