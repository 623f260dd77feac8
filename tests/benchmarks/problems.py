"""Bilevel problems that are small enough to know their hypergradients, and how to know them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adam, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from diopt_lightning.bilevel import BilevelProblem, DoubleBackward, HypergradientEstimator, MicroBatches
from diopt_lightning.bilevel.estimators.spectrum import ritz_values

Kind = Literal["t5", "llama"]

# Tiny language models with instructions.
VOCABULARY, WIDTH, TASKS, INSTRUCTION, SOURCE, TARGET = 24, 12, 4, 3, 6, 3
EXAMPLES, MINI_BATCH = 32, 8
TRAINING_STEPS, OBSERVED_STEPS, DESCENT_STEPS = 300, 100, 100
LEARNING_RATE = 1e-2
# Of the largest eigenvalue: the system is then well posed, with a condition number of about 100.
DAMPING = 0.01
# Rows of the Hessian that are computed at once.
ROWS = 128

# A tiny regression with weighted groups of examples.
INPUTS, HIDDEN, GROUPS, GROUP_SIZE, VALIDATION = 3, 6, 8, 4, 64
NOISE, WEIGHT_DECAY = 0.5, 0.05
WARMUP_STEPS = 1000
# Of the logits of the groups' weights: the first step of an outer Adam with this learning rate.
OUTER_STEP = 0.2
CONVERGED = 1e-12
DIFFERENCE = 1e-4


def dense_hypergradient(problem: BilevelProblem) -> Tensor:
    r"""Return :math:`\partial L_{val}/\partial\phi - J^\top H^{-1} \partial L_{val}/\partial\theta`, flat.

    Nothing of the library is used: the Hessian is computed as a matrix, and the system is solved by factorization.

    Raises:
        ValueError: If the Hessian is not positive definite.
    """
    inner, outer = list(problem.inner_parameters), list(problem.outer_parameters)
    found = torch.autograd.grad(whole(problem.outer_loss)(), [*inner, *outer], allow_unused=True)
    outer_gradient = filled(found, [*inner, *outer])
    v0, direct = flat(outer_gradient[: len(inner)]), flat(outer_gradient[len(inner) :])
    gradient = inner_gradient(problem, create_graph=True)
    factor, failed = torch.linalg.cholesky_ex(dense_hessian(gradient, inner))
    if failed:
        raise ValueError("The inner Hessian is not positive definite: this point belongs to no strict minimum.")
    solution = torch.cholesky_solve(v0[:, None], factor)[:, 0]
    mixed = filled(torch.autograd.grad(gradient, outer, solution, allow_unused=True), outer)
    return direct - flat(mixed)


def dense_hessian(gradient: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the Hessian as a matrix, from a flat gradient that has a graph."""
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for directions in torch.split(torch.eye(len(gradient), dtype=gradient.dtype), ROWS):
            parts = torch.autograd.grad(gradient, parameters, directions, is_grads_batched=True, retain_graph=True)
            rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    hessian = torch.cat(rows)
    return (hessian + hessian.T) / 2  # norm layers that compute in float32 leave an asymmetry of 1e-7


def inner_gradient(problem: BilevelProblem, create_graph: bool = False) -> Tensor:
    """Return the gradient of the inner loss with respect to theta, flat."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        loss = whole(problem.inner_loss)()
        return flat(torch.autograd.grad(loss, problem.inner_parameters, create_graph=create_graph))


def whole(loss: Callable[[], Tensor] | MicroBatches) -> Callable[[], Tensor]:
    """Return a loss that does not come in micro-batches.

    Raises:
        TypeError: If it does.
    """
    if isinstance(loss, MicroBatches):
        raise TypeError("A dense reference is computed of losses in one piece.")
    return loss


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Put zeros where a parameter is not reached."""
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


@dataclass(frozen=True)
class Examples:
    """Sequences of tokens: a source for each example, and a target that depends on its task."""

    tasks: Tensor
    sources: Tensor
    targets: Tensor

    @classmethod
    def draw(cls) -> "Examples":
        """Draw as many of each task; the target is the source's beginning, shifted by the task's offset."""
        tasks = torch.arange(EXAMPLES) % TASKS
        sources = torch.randint(2, VOCABULARY, (EXAMPLES, SOURCE))
        targets = (sources[:, :TARGET] - 2 + 5 * tasks[:, None]) % (VOCABULARY - 2) + 2
        return cls(tasks, sources, targets)

    def __getitem__(self, chosen: Tensor) -> "Examples":
        """Return some of the examples."""
        return Examples(self.tasks[chosen], self.sources[chosen], self.targets[chosen])


class InstructedModel(nn.Module):
    r"""A tiny language model whose inputs begin with the learned instruction of their task.

    The outer loss is that of other examples, which are all given the mean instruction, as a constant: there is no
    direct term that would hide what is wrong with the implicit one.

    Args:
        kind: ``t5``, an encoder and a decoder of one layer with gated GELU, or ``llama``, a decoder of two layers.
        seed: Of the weights, the instructions and the examples.

    Attributes:
        damping: :math:`\delta` of the inner loss's term :math:`\frac{\delta}{2} \| \theta - \theta_0 \|^2`.
        anchor: :math:`\theta_0`.
    """

    def __init__(self, kind: Kind, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        self.model: PreTrainedModel = (t5() if kind == "t5" else llama()).double().eval()
        self.instructions = nn.Parameter(0.5 * torch.randn(TASKS, INSTRUCTION, WIDTH, dtype=torch.float64))
        self.train_examples, self.validation_examples = Examples.draw(), Examples.draw()
        self.damping = 0.0
        self.anchor: list[Tensor] = []

    def theta(self) -> list[nn.Parameter]:
        """The inner parameters."""
        return list(self.model.parameters())

    def loss(self, examples: Examples, instructions: Tensor) -> Tensor:
        """Return the cross-entropy of the targets."""
        embed = self.model.get_input_embeddings()
        inputs = torch.cat([instructions[examples.tasks], embed(examples.sources)], dim=1)
        if self.kind == "t5":
            loss: Tensor = self.model(inputs_embeds=inputs, labels=examples.targets).loss
            return loss
        inputs = torch.cat([inputs, embed(examples.targets)], dim=1)
        logits = self.model(inputs_embeds=inputs).logits[:, -TARGET - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), examples.targets.flatten())

    def inner_loss(self, examples: Examples) -> Tensor:
        """Return the loss of training examples and the damping term."""
        loss = self.loss(examples, self.instructions)
        if self.damping:
            distances = [(p - a).square().sum() for p, a in zip(self.theta(), self.anchor, strict=True)]
            loss = loss + self.damping / 2 * torch.stack(distances).sum()
        return loss

    def outer_loss(self) -> Tensor:
        """Return the loss of validation examples with the mean instruction."""
        mean = self.instructions.detach().mean(dim=0, keepdim=True)
        return self.loss(self.validation_examples, mean.expand(TASKS, -1, -1))

    def problem(self, optimizer: Optimizer | None = None, chosen: Tensor | None = None) -> BilevelProblem:
        """Return the bilevel problem, on all training examples or on the chosen ones."""
        examples = self.train_examples if chosen is None else self.train_examples[chosen]
        return BilevelProblem(
            lambda: self.inner_loss(examples),
            self.outer_loss,
            self.theta(),
            [self.instructions],
            inner_optimizer=optimizer,
        )

    def anchored(self, damping: float) -> None:
        """Add the damping term, around the current theta."""
        self.damping, self.anchor = damping, [parameter.detach().clone() for parameter in self.theta()]

    def undamped(self) -> "InstructedModel":
        """Return a copy with the same values and no damping term."""
        other = copy.deepcopy(self)
        other.damping = 0.0
        return other

    def single(self) -> "InstructedModel":
        """Return a copy with the same values in float32."""
        other = copy.deepcopy(self).float()
        other.anchor = [entry.float() for entry in self.anchor]
        return other


def t5() -> PreTrainedModel:
    """Return a T5 of about 3,300 random weights."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=6,
            num_heads=2,
            d_ff=16,
            num_layers=1,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            decoder_start_token_id=0,
            relative_attention_num_buckets=8,
        )
    )


def llama() -> PreTrainedModel:
    """Return a Llama of about 3,200 random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


@dataclass(frozen=True)
class LanguageModelProblem:
    """A trained model's problem, damped, in the forms that estimators need.

    Attributes:
        damped: In float64; its inner optimizer is the Adam that trained theta.
        undamped: The same point without the damping term, for an estimator that adds it by itself.
        single: The damped problem in float32, for differences of gradients: norm layers compute in float32 whatever
            the dtype of the model is, and a difference's step must fit to the precision that there is.
        damping: The damping term's factor.
    """

    damped: BilevelProblem
    undamped: BilevelProblem
    single: BilevelProblem
    damping: float


def language_model_problem(
    kind: Kind,
    seed: int,
    training_observers: Sequence[HypergradientEstimator] = (),
    descent_observers: Sequence[HypergradientEstimator] = (),
) -> LanguageModelProblem:
    r"""Train a tiny language model and damp its inner problem.

    300 steps of Adam on all 32 examples lead to :math:`\theta_0`. There the damping term
    :math:`\frac{\delta}{2} \| \theta - \theta_0 \|^2` is added, with :math:`\delta` 1% of the Hessian's largest
    eigenvalue. It has the Hessian of a weight decay and leaves theta where it is, where a weight decay so strong would
    train another model. 100 steps of gradient descent on the damped loss of all examples, with a step of one over the
    largest eigenvalue, come last.

    Args:
        kind: The model.
        seed: Of everything that is random.
        training_observers: Estimators that see a gradient in each of the last 100 steps of Adam. It is that of a
            mini-batch of 8 examples: gradients of all examples vanish at a fit and say nothing about curvature.
        descent_observers: Estimators that see the steps of gradient descent.
    """
    model = InstructedModel(kind, seed)
    adam = Adam(model.theta(), lr=LEARNING_RATE)
    batches = torch.Generator().manual_seed(seed)
    for step in range(TRAINING_STEPS):
        if step >= TRAINING_STEPS - OBSERVED_STEPS:
            chosen = torch.randperm(EXAMPLES, generator=batches)[:MINI_BATCH]
            observe(model.problem(adam, chosen), training_observers)
        inner_step(model.problem(adam))
    largest = largest_eigenvalue(model.problem())
    model.anchored(DAMPING * largest)
    descent = model.problem(SGD(model.theta(), lr=1 / largest))
    for _ in range(DESCENT_STEPS):
        inner_step(descent, descent_observers)
    return LanguageModelProblem(
        model.problem(adam), model.undamped().problem(), model.single().problem(), model.damping
    )


def inner_step(problem: BilevelProblem, observers: Sequence[HypergradientEstimator] = ()) -> None:
    """Take a step of the problem's inner optimizer.

    Raises:
        ValueError: If it has none.
    """
    if problem.inner_optimizer is None:
        raise ValueError("The problem has no inner optimizer.")
    observe(problem, observers)
    problem.inner_optimizer.step()


def observe(problem: BilevelProblem, observers: Sequence[HypergradientEstimator]) -> None:
    """Compute the inner gradient and show it to estimators."""
    for parameter in problem.inner_parameters:
        parameter.grad = None
    whole(problem.inner_loss)().backward(inputs=list(problem.inner_parameters))
    for observer in observers:
        observer.observe(problem)


def largest_eigenvalue(problem: BilevelProblem, products: int = 40) -> float:
    """Return the largest eigenvalue of the inner Hessian, by more products than an estimator would spend on it."""
    with DoubleBackward().linearize(problem) as linearization:
        return ritz_values(linearization, linearization.gradient(), products)[-1].value


class WeightedRegression:
    r"""A two-layer tanh network of 31 parameters, and a weight :math:`\sigma(\phi_i)` for each group of examples.

    The targets of every other group are noisy. The outer loss is that of clean examples.

    Args:
        seed: Of the examples, the noise and the weights.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.x_val = normal(GROUPS * GROUP_SIZE, INPUTS), normal(VALIDATION, INPUTS)
        noisy = (torch.arange(GROUPS) % 2).repeat_interleave(GROUP_SIZE)
        self.y = truth(self.x) + NOISE * noisy * normal(len(self.x))
        self.y_val = truth(self.x_val)
        self.theta = (0.5 * normal(INPUTS * HIDDEN + 2 * HIDDEN + 1)).requires_grad_()
        self.phi = torch.zeros(GROUPS, dtype=torch.float64, requires_grad=True)
        self.batches = generator

    def inner_loss(self, chosen: Tensor | None = None) -> Tensor:
        """Return the weighted squared error of all training examples, or of the chosen ones, and the decay."""
        chosen = torch.arange(len(self.x)) if chosen is None else chosen
        # Weights go into both arguments, so that the loss is one of those that a Gauss-Newton matrix knows.
        root = self.phi.sigmoid().repeat_interleave(GROUP_SIZE)[chosen].sqrt()
        error = F.mse_loss(root * predicted(self.theta, self.x[chosen]), root * self.y[chosen])
        return error + WEIGHT_DECAY / 2 * self.theta.square().sum()

    def outer_loss(self) -> Tensor:
        """Return the squared error of validation examples."""
        return F.mse_loss(predicted(self.theta, self.x_val), self.y_val)

    def problem(self, optimizer: Optimizer | None = None, chosen: Tensor | None = None) -> BilevelProblem:
        """Return the bilevel problem, on all training examples or on the chosen ones."""
        return BilevelProblem(
            lambda: self.inner_loss(chosen), self.outer_loss, [self.theta], [self.phi], inner_optimizer=optimizer
        )

    def mini_batch(self) -> Tensor:
        """Draw the numbers of some examples."""
        return torch.randperm(len(self.x), generator=self.batches)[:MINI_BATCH]

    def move(self, parameter: Tensor, value: Tensor) -> None:
        """Write a value into theta or phi."""
        with torch.no_grad():
            parameter.copy_(value)

    def converge(self, steps: int = 200) -> None:
        """Go to the minimum of this basin by damped Newton steps.

        Raises:
            RuntimeError: If it is not reached, or is not strict.
        """
        for _ in range(steps):
            gradient = inner_gradient(self.problem(), create_graph=True)
            values, vectors = torch.linalg.eigh(dense_hessian(gradient, [self.theta]))
            gradient = gradient.detach()
            if gradient.norm() < CONVERGED and values[0] > 0:
                return
            # Descends along negative curvature too; at a minimum it is Newton's step.
            step = vectors @ (vectors.T @ gradient / values.abs().clamp(min=1e-4))
            self._search(step)
        raise RuntimeError(f"Newton's method ended at a gradient of {gradient.norm():.1e}.")

    def _search(self, step: Tensor) -> None:
        """Take the step, halved until the loss does not grow (beyond rounding)."""
        start, before = self.theta.detach().clone(), self.inner_loss().item()
        length = 1.0
        self.move(self.theta, start - step)
        while self.inner_loss().item() > before + 1e-14 and length > 1e-6:
            length /= 2
            self.move(self.theta, start - length * step)

    def brute_force(self) -> Tensor:
        """Return the hypergradient by training again at values of phi nearby, from a minimum on.

        Raises:
            RuntimeError: If training does not converge or leaves the basin.
        """
        phi, theta = self.phi.detach().clone(), self.theta.detach().clone()
        slopes = []
        for direction in torch.eye(GROUPS, dtype=phi.dtype):
            losses = []
            for sign in (1.0, -1.0):
                self.move(self.phi, phi + sign * DIFFERENCE * direction)
                self.move(self.theta, theta)
                self.converge()
                if (self.theta - theta).norm() > 1e3 * DIFFERENCE:
                    raise RuntimeError("Training again ended in another basin.")
                losses.append(self.outer_loss().item())
            slopes.append((losses[0] - losses[1]) / (2 * DIFFERENCE))
        self.move(self.phi, phi)
        self.move(self.theta, theta)
        return torch.tensor(slopes, dtype=phi.dtype)


def truth(x: Tensor) -> Tensor:
    """What the regression is to learn."""
    return torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] / 2


def predicted(theta: Tensor, x: Tensor) -> Tensor:
    """Return the outputs of the network with parameters ``theta``."""
    first, bias, second, shift = torch.split(theta, [INPUTS * HIDDEN, HIDDEN, HIDDEN, 1])
    outputs: Tensor = (x @ first.view(INPUTS, HIDDEN) + bias).tanh() @ second + shift
    return outputs


@dataclass(frozen=True)
class RetrainingProblem:
    """A problem some inner steps after an outer step, and its true hypergradient.

    Attributes:
        problem: The problem at the current theta.
        expected: The hypergradient of the converged inner problem, by training again, flat.
        distance: How far theta is from its minimum, relative to the way that the outer step moved the minimum.
    """

    problem: BilevelProblem
    expected: Tensor
    distance: float


def retraining_problem(
    seed: int, steps: int | None, observers: Sequence[HypergradientEstimator] = ()
) -> RetrainingProblem:
    r"""Take an outer step from a converged point, and some inner steps.

    1,000 steps of Adam on mini-batches of 8 of the 32 examples give Adam its second moments, Newton's method goes on to
    the minimum, :math:`\phi` moves by 0.2 in every coordinate against the sign of the hypergradient (as in an outer
    Adam's first step), and ``steps`` steps of Adam on all examples follow.

    Args:
        seed: Of everything that is random.
        steps: The inner steps; ``None`` for convergence.
        observers: Estimators that see the last 100 mini-batches and the inner steps.

    Raises:
        RuntimeError: If the hypergradient by training again is not that of a dense solve at the minimum.
    """
    regression = WeightedRegression(seed)
    adam = Adam([regression.theta], lr=LEARNING_RATE)
    for step in range(WARMUP_STEPS):
        observed = step >= WARMUP_STEPS - OBSERVED_STEPS
        inner_step(regression.problem(adam, regression.mini_batch()), observers if observed else ())
    adam.state[regression.theta]["exp_avg"].zero_()  # the last mini-batches' direction leads away from the minimum
    regression.converge()
    start = regression.theta.detach().clone()
    ascent = dense_hypergradient(regression.problem())
    regression.move(regression.phi, regression.phi - OUTER_STEP * ascent.sign())
    regression.converge()
    end = regression.theta.detach().clone()
    expected = regression.brute_force()
    if (dense_hypergradient(regression.problem()) - expected).norm() > 1e-5 * expected.norm():
        raise RuntimeError("Training again and a dense solve at the minimum disagree.")
    if steps is not None:
        regression.move(regression.theta, start)
        for _ in range(steps):
            inner_step(regression.problem(adam), observers)
    distance = ((regression.theta - end).norm() / (start - end).norm()).item()
    return RetrainingProblem(regression.problem(adam), expected, distance)
