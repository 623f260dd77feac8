"""The alternation: K inner steps, then one outer step, for any inner and outer loss."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diopt_lightning.bilevel import Chebyshev, HypergradientEstimator, ProcessAverage, mean_hypergradient
from diopt_lightning.bilevel.sharding import any_sharded
from diopt_lightning.errors import ConfigurationError, require_at_least
from diopt_lightning.modules.gradients import constants, gradient_norm
from diopt_lightning.modules.levels import Level
from diopt_lightning.modules.one_run import OneRun
from diopt_lightning.modules.pairs import batch_of_each_level, check_pairs
from diopt_lightning.modules.parameter_groups import ParameterGroup
from diopt_lightning.modules.parameters import once
from diopt_lightning.modules.skipping import SkippedSteps
from diopt_lightning.modules.strategies import refuse_fabric
from diopt_lightning.resuming.checkpoint_reading import understood
from diopt_lightning.resuming.processes import of_all_processes, of_this_process
from diopt_lightning.resuming.training_state import check_kind, check_weights


class BilevelModule(OneRun):
    r"""Bilevel optimization of any Lightning module: override the two losses and say which parameters are outer.

    Each training step is given ``{"inner": batch, "outer": batch}`` and takes an inner step,

    .. math:: \theta \leftarrow \theta - \eta_\theta \nabla_\theta L_{train}(\theta, \phi) .

    After every ``inner_steps`` of them an outer step follows, along the hypergradient of the estimator,

    .. math:: \phi \leftarrow \phi - \eta_\phi \, dL_{val}(\theta^*(\phi), \phi) / d\phi ,

    computed from the same inner batch and its outer batch. (The reference implementation uses the batch of the *next*
    inner step; one that has just been used keeps the alternation in one place.) Outer batches of other steps are not
    used; shuffle the outer loader, so that they differ from round to round. A ``fast_dev_run`` ends with an outer step,
    whatever ``inner_steps`` is.

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
        inner_scheduler: Makes a learning rate scheduler that advances after every inner step, e.g. `LinearWithWarmup`.
        outer_scheduler: The same for every outer step.
        inner_groups: Parameters of theta with options of their own in the optimizer: `ParameterGroup`. Default: none.
        outer_groups: The same of phi.
        inner_gradient_clip: Largest norm of the inner gradient; ``null`` for no limit. Default: 1, as in the paper.
        outer_gradient_clip: Largest norm of the hypergradient; ``null`` for no limit. Default: 1, as in the paper.
        inner_accumulation: Batches whose gradients are averaged into one inner optimizer step.
        outer_accumulation: Pairs of batches whose hypergradients are averaged into one outer step: the last ones of the
            round, so at most ``inner_steps * inner_accumulation``.
        outer_batches: Batches of the outer level at each step, over whose losses the outer loss is the mean. The data
            module of this package gives as many; of other loaders, pass as many: ``{"outer": [loader] * 4, ...}``.
        micro_batches: Parts in which every batch of either level is computed, one at a time, to save memory; the values
            are those of whole batches. See :meth:`split_batch` and :meth:`batch_weight`. Default: 1.
        skip_limit: Steps in a row that are skipped because a loss or a gradient is not finite, at which the run ends.
        options: Those of further base classes.

    Attributes:
        inner_level, outer_level: Optimizer, schedule, clip and accumulation of theta and of phi.
        inner_batches_seen: Training batches so far.
        inner_steps_taken: Inner optimizer steps so far; equals ``trainer.global_step``.
        outer_steps_taken: Outer optimizer steps so far.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> class HyperCleaning(BilevelModule):  # learn the weight of each of 100 noisily labelled rows
        ...     def __init__(self):
        ...         super().__init__(inner_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        ...         self.model = torch.nn.Linear(8, 1)
        ...         self.weights = torch.nn.Parameter(torch.zeros(100))
        ...     def inner_loss(self, batch):
        ...         x, y, index = batch
        ...         return (self.weights[index].sigmoid() * (self.model(x) - y).square().squeeze(1)).mean()
        ...     def outer_loss(self, batch):
        ...         return (self.model(batch[0]) - batch[1]).square().mean()
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
        inner_groups: list[ParameterGroup] | None = None,
        outer_groups: list[ParameterGroup] | None = None,
        inner_gradient_clip: float | None = 1.0,
        outer_gradient_clip: float | None = 1.0,
        inner_accumulation: int = 1,
        outer_accumulation: int = 1,
        outer_batches: int = 1,
        micro_batches: int = 1,
        skip_limit: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require_at_least(1, inner_steps=inner_steps, outer_batches=outer_batches)
        require_at_least(1, micro_batches=micro_batches, skip_limit=skip_limit)
        # Not defaults in the signature: from there the parser would carry AdamW's weight decay over to an Adam that a
        # configuration names instead.
        inner_optimizer = inner_optimizer or partial(torch.optim.AdamW, lr=1e-5)
        outer_optimizer = outer_optimizer or partial(torch.optim.Adam, lr=1e-2)
        inner = inner_scheduler, inner_gradient_clip, inner_accumulation, inner_groups or ()
        outer = outer_scheduler, outer_gradient_clip, outer_accumulation, outer_groups or ()
        self.inner_level = Level("inner", inner_optimizer, *inner)
        self.outer_level = Level("outer", outer_optimizer, *outer)
        check_pairs(outer_accumulation, inner_steps, inner_accumulation)
        # Two optimizers with steps of their own: Lightning's automatic optimization has one.
        self.automatic_optimization = False
        self.hypergradient = hypergradient if hypergradient is not None else Chebyshev()
        self.inner_steps = inner_steps
        self.outer_batches = outer_batches
        self.micro_batches = micro_batches
        self.skip_limit = skip_limit
        self._average = ProcessAverage()
        self._begin_run()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Take an inner step, and an outer step where a round of ``inner_steps`` is complete.

        Returns:
            The ``inner_loss`` and, after an outer step, the ``outer_loss``, for callbacks.

        Raises:
            ConfigurationError: If the batch is not one of each level, or this runs under Fabric.
        """
        refuse_fabric(self)
        inner_batch, outer_batch = batch_of_each_level(batch, self.outer_batches)
        with understood(Path(str(self.trainer.ckpt_path))):
            recorded = self._round.restore(inner_batch, outer_batch, self.device)
        if recorded is not None:
            self._return_to_the_round(recorded, outer_batch)
        inner_loss, stepped = self._inner_step(inner_batch, outer_batch)
        losses = {"inner_loss": inner_loss}
        if stepped and (self.inner_steps_taken % self.inner_steps == 0 or self._trial_ends):
            outer_loss = self._outer_step()
            if outer_loss is not None:
                losses["outer_loss"] = outer_loss
        return losses

    def _accumulate(self, batch: Any, complete: bool) -> Tensor:
        """Add the gradient of the inner loss to that of the inner step; return the loss."""
        with constants(self.outer_parameters()):
            return self.add_gradient(self.inner_loss, batch, self.inner_level.accumulation, exchange=complete)

    def _inner_step(self, batch: Any, outer_batch: Any) -> tuple[Tensor, bool]:
        """Accumulate a gradient, and move the inner parameters along it if it is complete; return loss and whether."""
        self.inner_batches_seen += 1
        complete = self._round.add_batches(batch, outer_batch, self.inner_batches_seen, self.device)
        complete = complete or self._trial_ends
        loss = self._accumulate(batch, complete)
        self.log("inner_loss", loss, prog_bar=True)
        if not complete:
            return loss, False
        optimizer, parameters = self.optimizers()[0], once(self.inner_parameters())  # type: ignore[index]
        norm = gradient_norm(parameters)
        if not norm.isfinite():
            optimizer.zero_grad()
            self._round.drop_step()
            self._skipped.skip("inner", f"the norm of the inner gradient is {norm.item()}.", self)
            return loss, False
        batches = list(self._round.inner_batches)
        self._round.steps.append(batches)
        self.hypergradient.observe(self.problem(batches, outer_batch))
        self._idle[0].see(self, parameters, self.optimizers(use_pl_optimizer=False)[0])  # type: ignore[index]
        self.inner_level.step(optimizer, parameters, norm, self.trainer)
        self.inner_steps_taken += 1
        self._skipped.taken()
        self.log("inner_gradient_norm", norm)
        return loss, True

    def _outer_step(self) -> Tensor | None:
        """Move the outer parameters along the hypergradient of the last pairs of batches.

        Returns:
            The outer loss; ``None`` where something was not finite, and no step was taken.
        """
        # The plain optimizer: a step of Lightning's wrapper would count in `trainer.global_step`.
        optimizer = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
        parameters = once(self.outer_parameters())
        pairs, sent = list(self._round.pairs), self._average.bytes
        self._round.pairs.clear()
        try:
            estimate = mean_hypergradient([self.estimate_hypergradient(*pair) for pair in pairs])
        except FloatingPointError as error:
            self._skipped.skip("outer", str(error), self)
            return None
        for parameter, entry in zip(parameters, estimate.gradient, strict=True):
            parameter.grad = entry.to(parameter.dtype)
        norm = gradient_norm(parameters)
        if not norm.isfinite():
            optimizer.zero_grad()
            self._skipped.skip("outer", f"the norm of the hypergradient is {norm.item()}.", self)
            return None
        self._outer_norms.see(norm.item())
        self._idle[1].see(self, parameters, optimizer)
        self.outer_level.step(optimizer, parameters, norm, self.trainer)
        self.outer_steps_taken += 1
        self._skipped.taken()
        self.on_outer_step_end()
        (loss,) = self._average([estimate.outer_loss])
        self.log("outer_loss", loss, prog_bar=True)
        if self.trainer.world_size > 1:
            self.log("hypergradient/bytes", float(self._average.bytes - sent))
        self.log("hypergradient/norm", norm)
        self.log_dict({f"hypergradient/{name}": value for name, value in estimate.statistics.items()})
        return loss

    def _return_to_the_round(self, recorded: list[Any], outer_batch: Any) -> None:
        """Bring the first batch after an interruption to where the batches before it, of the same round, had come."""
        problems = [self.problem(batches, outer_batch) for batches in self._round.steps]
        with understood(Path(str(self.trainer.ckpt_path))):
            self.hypergradient.restore_recorded(recorded, [problem.inner_loss for problem in problems])
        if not self._round.inner_batches:
            return
        # Without notice: a model's running means, say, have seen these batches already.
        with self._round.redrawing(self.device), self.unnoticed():
            for batch in self._round.inner_batches:
                self._accumulate(batch, complete=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters, the estimator's state and what will still be used of an unfinished round."""
        super().on_save_checkpoint(checkpoint)
        needed = self._round.still_needed(self.inner_batches_seen, self.inner_steps_taken)
        now = self._round.state_dict(needed), self.hypergradient.recorded_state(needed.steps)
        unfinished, recorded = self._round.loaded or now
        checkpoint["bilevel"] = {
            "inner_batches_seen": self.inner_batches_seen,
            "inner_steps_taken": self.inner_steps_taken,
            "outer_steps_taken": self.outer_steps_taken,
            "estimator": type(self.hypergradient).__name__,
            "hypergradient": self.hypergradient.state_dict(),
            "skipped": self._skipped.state_dict(),
            # Of a sharded model, each process has recorded its own shards.
            "memory": of_all_processes(recorded) if any_sharded(self.inner_parameters()) else [recorded],
            "round": of_all_processes(unfinished),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added.

        Raises:
            ConfigurationError: If there is nothing of the kind, or the state is that of another estimator.
        """
        super().on_load_checkpoint(checkpoint)
        self._begin_run()
        state = state_of_a_bilevel_run(checkpoint, type(self).__name__, self.hypergradient)
        self.inner_batches_seen = state["inner_batches_seen"]
        self.inner_steps_taken = state["inner_steps_taken"]
        self.outer_steps_taken = state["outer_steps_taken"]
        self.hypergradient.load_state_dict(state["hypergradient"])
        self._skipped.load_state_dict(state["skipped"])
        recorded = state["memory"][0] if len(state["memory"]) == 1 else of_this_process(state["memory"])
        self._round.load_state_dict(state["round"], recorded or [])


def state_of_a_bilevel_run(
    checkpoint: dict[str, Any], module: str, hypergradient: HypergradientEstimator
) -> dict[str, Any]:
    """What a checkpoint has of a bilevel run, which a module goes on from with an estimator.

    Raises:
        ConfigurationError: If there is nothing of the kind, the state is that of another estimator, or weights are not
            finite.
        TypeError: If it is not what such a run has saved.
    """
    if "bilevel" not in checkpoint:
        raise ConfigurationError(
            f"The checkpoint is not of a bilevel run, and {module} cannot go on from it: give one that such a run has "
            "saved."
        )
    check_weights(checkpoint.get("state_dict", {}))
    state: dict[str, Any] = checkpoint["bilevel"]
    estimator = type(hypergradient).__name__
    if state["estimator"] != estimator:
        raise ConfigurationError(
            f"The checkpoint has the state of {state['estimator']}, and `model.hypergradient` is {estimator}: give the "
            "configuration that the checkpoint was written with."
        )
    counters = dict.fromkeys(("inner_batches_seen", "inner_steps_taken", "outer_steps_taken"), 0)
    skipped = SkippedSteps(1).state_dict()
    own = {"hypergradient": hypergradient.state_dict(), "skipped": skipped, "memory": [], "round": []}
    check_kind(state, counters | own, "bilevel")
    kept = tree_leaves([state["hypergradient"], state["memory"]])
    check_weights({f"hypergradient.{number}": value for number, value in enumerate(kept)})
    return state
