"""Whether a run can go on from what a checkpoint has of weights, loops, optimizers and schedules."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from diopt_lightning.bilevel.sharding import any_sharded
from diopt_lightning.errors import ConfigurationError, one_line
from diopt_lightning.resuming.messages import say


def check_weights(weights: Mapping[str, Any]) -> None:
    """Refuse weights that are NaN or infinite; minus infinity may be a mask.

    Raises:
        ConfigurationError: If one is.
    """
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool((value < math.inf).all()):
            raise ConfigurationError(
                f"`{name}` has values in the checkpoint that are NaN or infinite: give one that was saved before."
            )


def check_training_state(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Check what Lightning is about to hand out, which it and PyTorch take as it is.

    Raises:
        TypeError, ValueError, or what an optimizer raises: If it is not what such a run has saved.
    """
    check_kind(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops")
    if "optimizer_states" not in checkpoint:  # of sharded weights, of which each process reads what is its own
        return
    saved, schedules = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    if len(saved) != len(trainer.optimizers):
        raise ValueError(f"it has states of {len(saved)} optimizers, and this run has {len(trainer.optimizers)}")
    names = {parameter: name for name, parameter in trainer.lightning_module.named_parameters()}
    counters = checkpoint.get("bilevel") or {}
    steps = [checkpoint["global_step"], counters.get("outer_steps_taken", 0)]
    for number, (optimizer, state) in enumerate(zip(trainer.optimizers, saved, strict=True), start=1):
        check_optimizer_state(optimizer, state, f"optimizer {number}", names, begun=steps[number > 1] > 0)
    own, options = trainer.lr_scheduler_configs, checkpoint.get("callbacks", {}).get("OptimizerOptions", {})
    had = sum(name.startswith("scheduler ") for name in options.get("options", {}))
    if len(schedules) != len(own) and (schedules or had) and own:  # a run may be given its first schedule, or drop all
        raise ValueError(f"it has states of {len(schedules)} schedulers, and this run has {len(own)}")
    for number, (config, state) in enumerate(zip(own, schedules, strict=False), start=1):
        fresh = config.scheduler.state_dict()
        check_kind(state, fresh, f"scheduler {number}")
        lists = [key for key, value in fresh.items() if isinstance(value, list) and key in state]
        if "last_epoch" not in state or any(len(state[key]) != len(fresh[key]) for key in lists):
            raise ValueError(f"scheduler {number} has no `last_epoch`, or is of other groups of parameters")


def check_kind(saved: Any, own: Any, name: str) -> None:
    """Check that a value is of the kind that a run has in its place: numbers are numbers, counts none below zero.

    Where the run has nothing yet, anything may stand.

    Raises:
        TypeError: If it is of another kind.

    Example:
        >>> check_kind({"steps": 3, "more": 1}, {"steps": 0}, "part")
        >>> check_kind({"steps": None}, {"steps": 0}, "part")
        Traceback (most recent call last):
        ...
        TypeError: `part.steps` is None, where a run has 0
    """
    if isinstance(own, bool | str):
        right = isinstance(saved, type(own)) or (saved is None and isinstance(own, bool))
    elif isinstance(own, int | float):
        right = isinstance(saved, int | float) and not isinstance(saved, bool) and not math.isnan(saved)
        right = right and (math.isinf(own) or (saved < math.inf and not (isinstance(own, int) and saved < min(own, 0))))
    elif isinstance(own, Tensor):
        right = isinstance(saved, Tensor) and saved.shape == own.shape and not bool(saved.isnan().any())
    elif isinstance(own, Mapping):
        right = isinstance(saved, Mapping)
        for key in own.keys() & saved.keys() if right else ():
            check_kind(saved[key], own[key], f"{name}.{key}")
    elif isinstance(own, list | tuple):
        right = isinstance(saved, list | tuple)
        pairs = zip(saved, own, strict=True) if right and len(saved) == len(own) else ()
        for place, (entry, other) in enumerate(pairs):
            check_kind(entry, other, f"{name}.{place}")
    else:
        right = True
    if not right:
        raise TypeError(f"`{name}` is {one_line(saved, 40)}, where a run has {one_line(own, 40)}")


def check_optimizer_state(
    optimizer: Optimizer, saved: dict[str, Any], name: str, names: Mapping[nn.Parameter, str], begun: bool
) -> None:
    """Check the state of an optimizer, by a step of every parameter's stand-in, and say whose state is missing.

    Args:
        optimizer: The optimizer that is to have the state.
        saved: What its ``state_dict`` has returned.
        name: What messages call it.
        names: Those of its parameters.
        begun: Whether it has taken steps.

    Raises:
        TypeError, ValueError, or what the optimizer raises: If it cannot go on from there.
    """
    groups = saved["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"{name} has {len(groups)} groups of parameters, and in this run {len(optimizer.param_groups)}"
        )
    missing, states = [], dict(saved["state"])
    for number, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True), start=1):
        place = f"group {number} of {name}"
        check_kind(group, {key: value for key, value in own.items() if key != "params"}, place)
        if group.get("lr") is not None and not group["lr"] >= 0:
            raise ValueError(f"{place} has the learning rate {one_line(group['lr'], 40)}")
        if len(group["params"]) != len(own["params"]):
            raise ValueError(f"{place} has {len(group['params'])} parameters, and in this run {len(own['params'])}")
        for key, parameter in zip(group["params"], own["params"], strict=True):
            state = states.pop(key, None)
            if any_sharded([parameter]) or not stands_alone(optimizer):
                continue
            try:
                made = trial_step(optimizer, group, parameter, state or {})
            except Exception as error:
                what = f"{type(error).__name__}: {one_line(error, 120)}"
                raise ValueError(f"{name} cannot use the state of `{names.get(parameter, key)}`: {what}") from error
            if made and not state:
                missing.append(names.get(parameter, str(key)))
    if states:
        raise ValueError(f"{name} has states of {len(states)} parameters that are in none of its groups")
    if begun and missing:
        say(
            f"The checkpoint has no state of {name} for `{missing[0]}` (one of {len(missing)}), as of a parameter that "
            "had no gradient: it begins anew."
        )


def stands_alone(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of PyTorch's that treats each parameter by itself."""
    known = type(optimizer).__module__.startswith("torch.optim.")
    return known and not isinstance(optimizer, LBFGS | SparseAdam)


def trial_step(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, state: dict[str, Any]) -> bool:
    """Take a step of a stand-in of zeros, without a gradient of other than zeros; return whether it left a state.

    Raises:
        ValueError: If the state has something else than real tensors and numbers, or what comes out is not finite.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise ValueError(f"`{key}` is of {value.dtype}")
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(stand_in)
    trial: Any = object.__new__(type(optimizer))
    # Neither hooks nor a `step` that a scheduler watches.
    own = {key: OrderedDict() if key.endswith("_hooks") else value for key, value in vars(optimizer).items()}
    trial.__dict__.update({key: value for key, value in own.items() if key != "step"})
    trial.state, trial.param_groups = defaultdict(dict), [{**group, "params": [stand_in]}]
    copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    trial.load_state_dict({"state": {0: copied} if state else {}, "param_groups": [{**group, "params": [0]}]})
    trial.step()
    found: Sequence[Any] = [stand_in, *trial.state[stand_in].values()]
    if not all(bool(value.isfinite().all()) for value in found if isinstance(value, Tensor)):
        raise ValueError("a step from there is not finite")
    return len(found) > 1
