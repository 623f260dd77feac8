"""The empirical Fisher of inner gradients in place of the Hessian."""

from typing import Any

import torch

from diopt_lightning.bilevel.estimators.implicit import ImplicitEstimator, Solution
from diopt_lightning.bilevel.problem import BilevelProblem
from diopt_lightning.bilevel.products.base import Linearization, Product
from diopt_lightning.bilevel.sharding import placed, whole
from diopt_lightning.bilevel.vectors import Vector, add, as_vector, divide, dot, mean, multiply, scale
from diopt_lightning.errors import ConfigurationError, require_at_least


class NaturalHypergradient(ImplicitEstimator):
    r"""The natural hypergradient: the empirical Fisher of inner gradients for the Hessian.

    .. math:: p = (F + \delta I)^{-1} v_0 \qquad F = \frac{1}{r} \sum_{i=1}^{r} g_i g_i^\top

    (Kong, Chen, Zhang and Mou, "Natural hypergradient descent", arXiv 2602.10905, 2026.) Near a minimum of a likelihood
    the Hessian is the Fisher matrix, and its empirical form is made of gradients that the inner steps compute anyway.
    So the curvature is collected while they run (:meth:`observe`), and the hypergradient itself costs one product, for
    the mixed derivative. With the last ``rank`` gradients :math:`G` as
    columns the inverse is that of a small matrix,

    .. math:: p = \tfrac{1}{\delta} \left( v_0 - G (r \delta I + G^\top G)^{-1} G^\top v_0 \right) ,

    and without a ``rank`` the diagonal of :math:`F` is used, a running mean of squares as in Adam. (A full inverse of
    theta's size squared would fit small inner problems only.) Gradients of mini-batches give :math:`F` up to a factor,
    which the direction does not depend on as long as the damping is relative, as it is by default.

    It needs gradients that differ, of mini-batches: those of all data near a fit are small and say nothing.

    Cost: one product and ``rank`` vectors of theta's size (one for the diagonal). The right one where
    :class:`~diopt_lightning.bilevel.Identity` is all that can be paid for.

    Args:
        rank: The number of past gradients that are kept. Default: none, which takes the diagonal.
        decay: How much of the diagonal's running mean a step keeps. Default: 0.99.
        damping: What is added to every eigenvalue of the Fisher matrix. Default: a tenth of its largest one, or the
            mean of the diagonal.
        product: How to get the product. Default: :class:`~diopt_lightning.bilevel.DoubleBackward`.

    Statistics: those of :class:`~diopt_lightning.bilevel.ImplicitEstimator`, with the residual of the best multiple of
    :math:`p`, and ``damping``.

    Raises:
        ConfigurationError: If an argument is out of range.

    Example:
        >>> from diopt_lightning.bilevel import BilevelProblem
        >>> theta, phi = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda: (theta - phi).square().sum() / 2, lambda: (theta - 3).square().sum() / 2, [theta], [phi]
        ... )
        >>> estimator = NaturalHypergradient(damping=1.0)
        >>> problem.inner_loss().backward(inputs=[theta])  # the gradient is -1, its square 1
        >>> estimator.observe(problem)
        >>> estimator(problem).gradient  # -3 / (1 + 1)
        [tensor([-1.5000])]
    """

    scale_free = True

    def __init__(
        self, rank: int | None = None, decay: float = 0.99, damping: float | None = None, product: Product | None = None
    ) -> None:
        super().__init__(product)
        require_at_least(1, hint="Leave it out for the diagonal.", rank=rank)
        if not 0 <= decay < 1:
            raise ConfigurationError(f"`decay` must be at least 0 and below 1, got {decay}.")
        if damping is not None and not damping > 0:
            raise ConfigurationError(f"`damping` must be positive, got {damping}: it is divided by.")
        self.rank = rank
        self.decay = decay
        self.damping = damping
        self.reset()

    def reset(self) -> None:
        """Forget the Fisher matrix too; see :class:`HypergradientEstimator`."""
        super().reset()
        self._gradients: list[Vector] = []
        self._squares: Vector | None = None
        self._weight = 0.0

    def observe(self, problem: BilevelProblem) -> None:
        """Add the inner gradient in ``.grad`` to the Fisher matrix; see :class:`HypergradientEstimator`.

        Raises:
            ConfigurationError: If no inner parameter has a gradient.
        """
        parameters = problem.inner_parameters
        if all(parameter.grad is None for parameter in parameters):
            raise ConfigurationError(
                "NaturalHypergradient was shown an inner step without a gradient: call `observe(problem)` after the "
                "backward pass, which leaves it in `.grad`, and before the gradient is cleared."
            )
        gradient = as_vector([parameter.grad for parameter in parameters], parameters)
        if self.rank is not None:
            self._gradients = [*self._gradients, [entry.clone() for entry in gradient]][-self.rank :]
            return
        squares = multiply(gradient, gradient)
        before = scale(squares, 0.0) if self._squares is None else placed(self._squares, squares)
        self._squares = add(scale(before, self.decay), squares, 1 - self.decay)
        self._weight = self.decay * self._weight + 1 - self.decay

    def solve(self, linearization: Linearization, v0: Vector) -> Solution:
        """Apply the inverse of the damped Fisher matrix; see :class:`ImplicitEstimator`."""
        if self._squares is not None:
            return self._solve_diagonal(placed(self._squares, v0), v0)
        if self._gradients:
            return self._solve_low_rank(v0)
        raise ConfigurationError(
            "NaturalHypergradient has seen no inner gradient: call `observe(problem)` after the backward pass of each "
            "inner step and before its optimizer step. (BilevelModule does so by itself.)"
        )

    def _solve_diagonal(self, squares: Vector, v0: Vector) -> Solution:
        diagonal = scale(squares, 1 / self._weight)  # without the bias towards its start at zero
        damping = self.damping or mean(diagonal).item() or 1.0
        return Solution(divide(v0, diagonal, plus=damping), statistics={"damping": damping})

    def _solve_low_rank(self, v0: Vector) -> Solution:
        columns = [placed(column, v0) for column in self._gradients]
        rank = len(columns)
        gram = torch.stack([torch.stack([dot(a, b) for b in columns]) for a in columns])
        damping = self.damping or 0.1 * torch.linalg.eigvalsh(gram).max().item() / rank or 1.0
        right = torch.stack([dot(column, v0) for column in columns])
        identity = torch.eye(rank, dtype=gram.dtype, device=gram.device)
        coefficients = torch.linalg.solve(rank * damping * identity + gram, right)
        solution = v0
        for coefficient, column in zip(coefficients.tolist(), columns, strict=True):
            solution = add(solution, column, -coefficient)
        return Solution(scale(solution, 1 / damping), statistics={"damping": damping})

    def state_dict(self) -> dict[str, Any]:
        """Return the Fisher matrix."""
        squares = whole(self._squares) if self._squares is not None else None
        gradients = [whole(gradient) for gradient in self._gradients]
        fisher = {"gradients": gradients, "squares": squares, "weight": self._weight}
        return super().state_dict() | fisher

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._gradients, self._squares, self._weight = state["gradients"], state["squares"], state["weight"]
