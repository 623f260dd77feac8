"""Steps of the inner optimizer as functions that can be differentiated."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from diopt_lightning.bilevel.sharding import joined, shards
from diopt_lightning.bilevel.vectors import Vector, add, as_vector, dot, norm, scale, solver_dtype
from diopt_lightning.errors import ConfigurationError

DIFFERENTIABLE = (SGD, Adam, AdamW)
State = dict[str, Tensor]


@dataclass(frozen=True)
class InnerStep:
    r"""A step :math:`(\theta', s') = U(\theta, s, g)` of an optimizer with state :math:`s` along a gradient :math:`g`.

    The update is PyTorch's own, run with its ``differentiable`` option on copies, so weight decay, momentum, Nesterov's
    variant, AMSGrad and the current learning rate are what they are. These optimizers work entry by entry: of sharded
    parameters a process updates its own shards.

    Args:
        kind: The optimizer's class.
        options: Its options for each parameter.
        parameters: :math:`\theta` before the step, of this process.
        states: :math:`s` before the step, for each parameter.
        clip: The largest norm of the gradient that the optimizer is given; longer ones are scaled down.
    """

    kind: type[Optimizer]
    options: list[dict[str, Any]]
    parameters: Vector
    states: list[State]
    clip: float | None = None

    @classmethod
    def next_of(cls, optimizer: Optimizer | None, parameters: Sequence[Tensor], clip: float | None) -> "InnerStep":
        """Copy what the next step of ``optimizer`` depends on.

        Raises:
            ConfigurationError: If there is no optimizer, it is of another kind, or it lacks a parameter.
        """
        if type(optimizer) not in DIFFERENTIABLE:
            found = "none is given" if optimizer is None else f"it is {type(optimizer).__name__}"
            raise ConfigurationError(
                "This estimator differentiates steps of the problem's `inner_optimizer`, which must be one of "
                f"{', '.join(kind.__name__ for kind in DIFFERENTIABLE)}; {found}. Any other estimator works with any "
                "optimizer."
            )
        assert optimizer is not None
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        lacking = sum(id(parameter) not in groups for parameter in parameters)
        if lacking:
            raise ConfigurationError(f"`inner_optimizer` does not hold {lacking} of the `inner_parameters`.")
        accepted = set(inspect.signature(type(optimizer)).parameters) - {"params", "foreach", "fused", "capturable"}
        return cls(
            kind=type(optimizer),
            options=[{name: v for name, v in groups[id(p)].items() if name in accepted} for p in parameters],
            parameters=[parameter.clone() for parameter in shards(as_vector(parameters, parameters))],
            states=[
                {
                    name: shards([value.detach()])[0].clone()
                    for name, value in optimizer.state.get(p, {}).items()
                    if value is not None
                }
                for p in parameters
            ],
            clip=clip,
        )

    def saved(self) -> dict[str, Any]:
        """Return the fields by name, the optimizer's class as its name: plain data and tensors, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"kind": self.kind.__name__}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "InnerStep":
        """Make the step again of which :meth:`saved` returned the fields."""
        return cls(**(saved | {"kind": next(kind for kind in DIFFERENTIABLE if kind.__name__ == saved["kind"])}))

    def adjoint(self, gradient: Vector, outward: Vector, states: list[State]) -> tuple[Vector, Vector, list[State]]:
        r"""Pull an adjoint of :math:`(\theta', s')` back through the step.

        Args:
            gradient: :math:`g`, before clipping.
            outward: The adjoint of :math:`\theta'`.
            states: The adjoint of :math:`s'`, for each parameter; empty for zero.

        Returns:
            The adjoints of :math:`\theta`, :math:`g` and :math:`s`.
        """
        clipped, directions = shards(clipped_to(gradient, self.clip)), shards(outward)
        results = [
            self._adjoint(position, clipped[position], directions[position], states[position] if states else {})
            for position in range(len(gradient))
        ]
        of_parameters = joined([result[0] for result in results], gradient)
        of_gradient = unclipped(joined([result[1] for result in results], gradient), gradient, self.clip)
        return of_parameters, of_gradient, [result[2] for result in results]

    def _adjoint(self, position: int, gradient: Tensor, outward: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Pull adjoints of one parameter and its state back; return those of parameter, clipped gradient and state."""
        parameter = self.parameters[position].clone().requires_grad_()
        given = gradient.clone().requires_grad_()
        before = self._state_before(position, gradient)
        with torch.enable_grad():
            after, state_after = self._update(position, parameter, given, before)
        moving = {name: value for name, value in before.items() if value.requires_grad}
        outputs, directions = [after], [outward.to(after.dtype)]
        for name, direction in state.items():
            if state_after[name].requires_grad:
                outputs.append(state_after[name])
                directions.append(direction)
        inputs = [parameter, given, *moving.values()]
        adjoints = torch.autograd.grad(outputs, inputs, directions, allow_unused=True)
        filled = [torch.zeros_like(x) if a is None else a for a, x in zip(adjoints, inputs, strict=True)]
        return filled[0], filled[1], dict(zip(moving, filled[2:], strict=True))

    def _update(self, position: int, parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
        """Run PyTorch's update on copies with a graph."""
        copy = parameter.clone()
        copy.retain_grad()  # otherwise reading its `.grad` warns
        copy.grad = gradient
        options = self.options[position] | {"differentiable": True}
        if not self.states[position] and "dampening" in options:
            options["dampening"] = 0.0  # the first momentum is the gradient itself
        twin = self.kind([copy], foreach=False, **options)  # type: ignore[call-arg]
        twin.state[copy] = {name: value.clone() for name, value in state.items()}
        twin.step()
        return copy, dict(twin.state[copy])

    def _state_before(self, position: int, gradient: Tensor) -> State:
        """Return the state before the step, as leaves of a graph; zeros before the first step."""
        recorded = self.states[position]
        if not recorded and issubclass(self.kind, Adam):
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.options[position]["amsgrad"] else [])]
            recorded = {"step": torch.zeros(()), **{name: torch.zeros_like(gradient) for name in names}}
        elif not recorded and self.options[position].get("momentum"):
            recorded = {"momentum_buffer": torch.zeros_like(gradient)}
        state = {}
        for name, value in recorded.items():
            if name == "step":
                # PyTorch counts in float32, and takes powers of the tensor itself where it differentiates.
                state[name] = value.detach().double()
                continue
            value = value.detach().to(solver_dtype(value)).clone()
            if name.endswith("_sq"):
                # A square root has no derivative at 0. The smallest number in its place changes no step.
                value.clamp_(min=torch.finfo(value.dtype).tiny)
            state[name] = value.requires_grad_()
        return state


# What `torch.nn.utils.clip_grad_norm_` adds to a norm before it divides by it.
TINY = 1e-6


def clipped_to(gradient: Vector, limit: float | None) -> Vector:
    """Scale a vector to a norm of at most ``limit``, as ``torch.nn.utils.clip_grad_norm_`` does."""
    if limit is None:
        return gradient
    return scale(gradient, min(limit / (norm(gradient).item() + TINY), 1.0))


def unclipped(adjoint: Vector, gradient: Vector, limit: float | None) -> Vector:
    r"""Pull an adjoint back through :func:`clipped_to`.

    With the norm :math:`n` and the factor :math:`f = c / (n + \epsilon)`, where it is below 1, this is
    :math:`f a - \frac{f}{n (n + \epsilon)} \langle g, a \rangle \, g`.
    """
    size = norm(gradient).item()
    if limit is None or limit / (size + TINY) >= 1:
        return adjoint
    factor = limit / (size + TINY)
    along = dot(gradient, adjoint).item()
    return add(scale(adjoint, factor), gradient, -factor * along / (size * (size + TINY)))
