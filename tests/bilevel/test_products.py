"""Products with second derivatives: against dense matrices, each other, and models that cannot be differentiated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from diopt_lightning.bilevel import (
    SAMA,
    BilevelProblem,
    ConvergenceWarning,
    DoubleBackward,
    FiniteDifference,
    GaussNewton,
    Identity,
    MicroBatches,
    Neumann,
    Penalty,
    Product,
    ReverseOverForward,
)
from diopt_lightning.bilevel.vectors import Vector
from diopt_lightning.errors import ConfigurationError
from tests.bilevel.problems import Network, flat, randn, relative_error, rounding_of_differences
from tests.estimators import PRODUCTS, exported
from tests.tolerances import Error

pytestmark = pytest.mark.filterwarnings("error::diopt_lightning.bilevel.ConvergenceWarning")
CHECKS: list[Callable[[Callable[..., Product]], None]] = []
SECOND_ORDER = [product for product in exported(Product) if not product.supports_sharding]


def every_product(check: Callable[[Callable[..., Product]], None]) -> Callable[[Callable[..., Product]], None]:
    """Let a test run for all products at their defaults, and for those of other files."""
    CHECKS.append(check)
    return pytest.mark.parametrize("product", exported(Product))(check)


def random_vector(problem: BilevelProblem, seed: int = 7) -> Vector:
    return [randn(*p.shape, seed=seed + i).to(p.dtype) for i, p in enumerate(problem.inner_parameters)]


@pytest.mark.parametrize("row", [row for row in PRODUCTS if row.error is not None], ids=lambda row: row.name)
def test_equals_the_dense_matrices(row):
    case, make, tolerance = Network(), row.make, row.error
    before = [parameter.detach().clone() for parameter in case.problem.inner_parameters]
    with make().linearize(case.problem) as linearization:
        for seed in (1, 2):
            v = random_vector(case.problem, seed)
            curvature, mixed = linearization.both(v)
            assert relative_error(curvature, case.hessian @ flat(v)) < tolerance
            assert relative_error(mixed, case.mixed @ flat(v)) < tolerance
            assert relative_error(linearization.hessian(v), case.hessian @ flat(v)) < tolerance
        assert linearization.inner_loss.item() == pytest.approx(case.problem.inner_loss().item(), rel=1e-9)
        expected = flat(torch.autograd.grad(case.problem.inner_loss(), case.problem.inner_parameters))
        assert Error((flat(linearization.gradient()) - expected).norm()) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, case.problem.inner_parameters, strict=True))


class Classifier:
    """A tanh network for three classes, its cross-entropy with a weight decay, and its logits as a function."""

    def __init__(self) -> None:
        self.x, self.y = randn(10, 3, seed=0), torch.arange(10) % 3
        self.first = randn(4, 3, seed=1).requires_grad_()
        self.second = randn(3, 4, seed=2).requires_grad_()
        self.phi = randn(10, seed=3).requires_grad_()
        self.problem = BilevelProblem(
            self.inner_loss, lambda: self.first.sum() + self.second.sum(), [self.first, self.second], [self.phi]
        )

    def logits(self, first: Tensor, second: Tensor) -> Tensor:
        return (self.x @ first.T).tanh() @ second.T

    def inner_loss(self) -> Tensor:
        losses = F.cross_entropy(self.logits(self.first, self.second), self.y, reduction="none")
        decay = self.first.square().sum() + self.second.square().sum()
        return (self.phi.sigmoid() * losses).mean() + 0.05 * decay


def test_gauss_newton_equals_its_dense_definition_and_is_positive():
    case = Classifier()
    jacobians = torch.autograd.functional.jacobian(case.logits, (case.first, case.second))
    jacobian = torch.cat([part.reshape(30, -1) for part in jacobians], dim=1)
    probabilities = case.logits(case.first, case.second).softmax(1).detach()
    blocks = [torch.diag(p) - torch.outer(p, p) for p in probabilities]
    outputs = torch.block_diag(*[w * b / 10 for w, b in zip(case.phi.sigmoid().detach(), blocks, strict=True)])
    expected = jacobian.T @ outputs @ jacobian + 0.1 * torch.eye(24, dtype=torch.float64)
    assert torch.linalg.eigvalsh(expected).min() > 0
    with GaussNewton().linearize(case.problem) as newton, DoubleBackward().linearize(case.problem) as exact:
        v = random_vector(case.problem)
        curvature, mixed = newton.both(v)
        assert relative_error(newton.hessian(v), expected @ flat(v)) < 1e-12
        assert relative_error(curvature, expected @ flat(v)) < 1e-12
        true_curvature, true_mixed = exact.both(v)
        assert relative_error(mixed, flat(true_mixed)) < 1e-12
        assert relative_error(curvature, flat(true_curvature)) > 1e-2  # the Hessian is another matrix here


def test_gauss_newton_without_a_loss_that_it_knows_says_so():
    theta, phi = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    problem = BilevelProblem(lambda: (theta * phi).square().sum(), theta.sum, [theta], [phi])
    with pytest.raises(ConfigurationError, match=r"none of torch.nn.functional's cross_entropy.*DoubleBackward"):
        Neumann(step_size=0.1, product=GaussNewton())(problem)


def weighted_parts(parts: list[slice]) -> tuple[BilevelProblem, BilevelProblem]:
    """The same weighted regression as a whole and in parts of unequal size."""
    x, y, phi = randn(12, 3, seed=0), randn(12, seed=1), randn(12, seed=2).requires_grad_()
    theta = randn(3, seed=3).requires_grad_()

    def loss(rows: slice) -> Tensor:
        return (phi[rows].sigmoid() * F.mse_loss((x[rows] @ theta).tanh(), y[rows], reduction="none")).mean()

    sizes = [part.stop - part.start for part in parts]
    split = MicroBatches([lambda part=part: loss(part) for part in parts], sizes)
    whole = BilevelProblem(lambda: loss(slice(0, 12)), lambda: loss(slice(3, 9)), [theta], [phi])
    return whole, BilevelProblem(split, split, [theta], [phi])


def tolerances(product: Any, problem: BilevelProblem, v: Vector, products: tuple[Vector, Vector]) -> list[float]:
    """Relative ones of both products where sums are in another order."""
    return rounding_of_differences(problem, v, products) if product is FiniteDifference else [1e-9, 1e-9]


@every_product
def test_micro_batches_equal_the_whole_batch(product):
    whole, split = weighted_parts([slice(0, 2), slice(2, 7), slice(7, 12)])
    v = random_vector(whole)
    with product().linearize(whole) as one, product().linearize(split) as several:
        expected, found = one.both(v), several.both(v)
        curvature, mixed = tolerances(product, whole, v, expected)
        assert relative_error(found[0], flat(expected[0])) < curvature
        assert relative_error(found[1], flat(expected[1])) < mixed
        assert relative_error(several.hessian(v), flat(expected[0])) < curvature
        assert several.inner_loss.item() == pytest.approx(one.inner_loss.item(), rel=1e-9)
        assert relative_error(several.gradient(), flat(one.gradient())) < 1e-9


def test_an_outer_loss_in_micro_batches_equals_the_whole():
    whole, split = weighted_parts([slice(0, 2), slice(2, 7), slice(7, 12)])
    whole = BilevelProblem(whole.inner_loss, whole.inner_loss, whole.inner_parameters, whole.outer_parameters)
    one, several = (Neumann(terms=3, step_size=0.1)(problem) for problem in (whole, split))
    assert relative_error(several.gradient, flat(one.gradient)) < 1e-12
    assert several.outer_loss.item() == pytest.approx(one.outer_loss.item(), rel=1e-12)


@every_product
def test_a_fraction_takes_the_hessian_of_the_first_parts_and_the_mixed_term_of_all(product):
    whole, split = weighted_parts([slice(0, 3), slice(3, 6), slice(6, 12)])
    first, _ = weighted_parts([slice(0, 12)])
    first = BilevelProblem(split.inner_loss.losses[0], first.outer_loss, split.inner_parameters, split.outer_parameters)
    v = random_vector(whole)
    with product(fraction=0.3).linearize(split) as stochastic:
        curvature, mixed = stochastic.both(v)
        alone = stochastic.hessian(v)
    with product().linearize(first) as part, product().linearize(whole) as everything:
        expected, of_all = part.both(v), everything.both(v)
        tolerance, _ = tolerances(product, first, v, expected)
        assert relative_error(curvature, flat(expected[0])) < tolerance
        assert relative_error(alone, flat(expected[0])) < tolerance
        assert relative_error(mixed, flat(of_all[1])) < tolerances(product, whole, v, of_all)[1]


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigurationError, match="`fraction` must be above 0"):
        DoubleBackward(fraction)


def language_model(kind: str) -> tuple[BilevelProblem, nn.Module]:
    """A tiny language model with a learned soft prefix, in float32 and with PyTorch's fused attention."""
    torch.manual_seed(0)
    ids, labels = torch.randint(2, 20, (4, 5)), torch.randint(2, 20, (4, 3))
    phi = nn.Parameter(torch.randn(2, 12))
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=20, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
    else:
        options = {"vocab_size": 20, "d_model": 12, "d_kv": 6, "num_heads": 2, "d_ff": 16, "num_layers": 1}
        model = T5ForConditionalGeneration(T5Config(**options, feed_forward_proj=kind, decoder_start_token_id=0))
    model.eval()

    def inner_loss() -> Tensor:
        embeddings = torch.cat([phi.expand(4, -1, -1), model.get_input_embeddings()(ids)], dim=1)
        if kind == "llama":
            return F.cross_entropy(model(inputs_embeds=embeddings).logits[:, -3:].flatten(0, 1), labels.flatten())
        return model(inputs_embeds=embeddings, labels=labels).loss

    def outer_loss() -> Tensor:
        if kind == "llama":
            return model(ids, labels=ids).loss
        return model(ids, labels=labels.flip(0)).loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    return BilevelProblem(inner_loss, outer_loss, parameters, [phi]), model


@pytest.mark.parametrize("kind", ["gated-gelu", "llama"])
def test_all_products_agree_on_language_models_with_fused_attention(kind):
    problem, model = language_model(kind)
    assert model.config._attn_implementation == "sdpa"
    v = random_vector(problem)
    with DoubleBackward().linearize(problem) as exact:
        curvature, mixed = (flat(part) for part in exact.both(v))
    for product, tolerance in ((ReverseOverForward(), 1e-4), (FiniteDifference(), 1e-2)):
        with product.linearize(problem) as other:
            found = other.both(v)
            assert relative_error(found[0], curvature) < tolerance
            assert relative_error(found[1], mixed) < tolerance
    with GaussNewton().linearize(problem) as newton:
        found = newton.both(v)
        assert relative_error(found[1], mixed) < 1e-4
        assert flat(v) @ flat(found[0]) > 0


def test_differences_check_themselves_and_say_where_they_are_wrong():
    kinks, _ = language_model("relu")
    size = sum(p.square().sum() for p in kinks.inner_parameters).sqrt().item()
    # So far that every unit of the ReLU layers crosses its kink.
    product = FiniteDifference()
    with product.linearize(kinks) as linearization:
        linearization._distance = size
        with pytest.warns(ConvergenceWarning, match=r"wrong by \d+%: the model has kinks .* Use `DoubleBackward`"):
            linearization.both(random_vector(kinks))
        assert linearization.statistics["finite_difference_error"] > 0.05
    smooth, _ = language_model("gated-gelu")
    estimator = Identity(product=FiniteDifference())
    assert Error(estimator(smooth).statistics["finite_difference_error"]) < 0.05
    assert "finite_difference_error" not in estimator(smooth).statistics  # once a run
    assert "finite_difference_error" not in Identity(product=FiniteDifference(check=False))(smooth).statistics


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_differences_beside_half_precision_are_told_from_derivatives(scheme):
    problem, model = language_model("gated-gelu")
    Identity(product=FiniteDifference(scheme, check=False))(problem)  # no warning, which would be an error here
    # What the model computes is rounded, as beside frozen weights in half precision; theta is not.
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: output.bfloat16().float())
    with pytest.warns(ConvergenceWarning, match=r"change by \d+% with the distance .* rounding error"):
        Identity(product=FiniteDifference(scheme, check=False))(problem)


def test_a_penalty_looks_for_a_distance_without_kinks():
    theta, phi = torch.ones(50).requires_grad_(), torch.ones(50).requires_grad_()
    kinks = torch.linspace(2e-5, 6e-5, 50)  # the usual distance is 3.5e-5 in each entry

    def inner_loss() -> Tensor:
        return (phi * theta.square()).sum() / 2 + 100 * ((theta - 1 + kinks).abs() - theta).sum()

    problem = BilevelProblem(inner_loss, lambda: -theta.sum(), [theta], [phi])
    estimator = Penalty(steps=1)
    found = estimator(problem)  # without a warning, which would be an error here
    assert estimator.state_dict()["times"] == 1 / 4
    assert relative_error(found.gradient, torch.full((50,), 1 / 1.05)) < 0.02
    estimator.reset()
    assert estimator.state_dict()["times"] is None


def test_differences_under_autocast_are_refused():
    problem, _ = language_model("gated-gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for estimator in (Identity(product=FiniteDifference()), SAMA(), Penalty()):
            with pytest.raises(ConfigurationError, match=r"autocast computes in torch\.bfloat16 is rounding error"):
                estimator(problem)


def test_differences_replay_the_dropout_mask():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
    phi, x = randn(6, seed=0).requires_grad_(), randn(6, 3, seed=1)
    problem = BilevelProblem(
        lambda: (phi.sigmoid() * network(x).squeeze(1).square()).mean(),
        lambda: network(x).mean(),
        list(network.parameters()),
        [phi],
    )
    v, before = random_vector(problem), torch.get_rng_state()
    with DoubleBackward().linearize(problem) as exact:
        expected = flat(exact.hessian(v))
    for product in (FiniteDifference(), ReverseOverForward()):
        with product.linearize(problem) as other:
            assert relative_error(other.hessian(v), expected) < 1e-7
    assert torch.equal(before, torch.get_rng_state())


class OnceDifferentiable(torch.autograd.Function):
    """The square, whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        queries = layer(x)[:, None]
        return F.scaled_dot_product_attention(queries, queries, queries)


def unfriendly(cause: str) -> BilevelProblem:
    """A regression through a module of which PyTorch has no second derivative."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # which otherwise gives up compiling the same code after several times
    before, layer, phi, x = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(2, 4, 8)), torch.randn(2, 4, 8)
    parameters = [*before.parameters(), *layer.parameters()]
    compiled = torch.compile(layer, backend="aot_eager")

    def forward(x: Tensor) -> Tensor:
        if cause == "fused attention":
            return attention(layer, x).squeeze(1)
        if cause == "torch.compile":
            return compiled(x)
        if cause == "reentrant checkpointing":
            return checkpoint(layer, x, use_reentrant=True)
        if cause == "nothing":
            return layer(x)
        return OnceDifferentiable.apply(layer(x))

    return BilevelProblem(
        lambda: F.mse_loss(forward(before(phi * x)), x), lambda: layer(x).square().mean(), parameters, [phi]
    )


CAUSES = {
    "fused attention": "attention runs in a fused kernel",
    "once differentiable": "differentiable only once",
}


@pytest.mark.parametrize("product", SECOND_ORDER)
@pytest.mark.parametrize("cause", CAUSES)
def test_models_without_second_derivatives_get_one_error_that_names_what_works(cause, product):
    message = f"{product.__name__} needs second derivatives, and .*Otherwise use `FiniteDifference`"
    with pytest.raises(ConfigurationError, match=message) as caught:
        Neumann(step_size=0.1, product=product())(unfriendly(cause))
    if product is DoubleBackward:
        assert CAUSES[cause] in str(caught.value)


@pytest.mark.parametrize("product", SECOND_ORDER)
def test_compiled_modules_run_as_they_were_written(product):
    problem, compiled = unfriendly("nothing"), unfriendly("torch.compile")
    v = random_vector(problem)
    with product().linearize(problem) as plain, product().linearize(compiled) as found:
        assert relative_error(found.hessian(v), flat(plain.hessian(v))) < 1e-6
    with torch.enable_grad():  # and compiled again afterwards, where nothing is differentiated twice
        gradient = torch.autograd.grad(compiled.inner_parts()[0][0](), compiled.inner_parameters, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            gradient[0].sum().backward()


def test_reentrant_checkpointing_is_named():
    with pytest.raises(ConfigurationError, match="reentrant way"):
        Neumann(step_size=0.1)(unfriendly("reentrant checkpointing"))


@pytest.mark.parametrize("cause", CAUSES)
def test_finite_differences_work_with_them(cause, caplog):
    estimate = Neumann(step_size=0.1, product=FiniteDifference())(unfriendly(cause))
    assert estimate.gradient[0].norm() > 0
    assert "could not be checked against an exact product" in caplog.text


def test_differences_of_half_precision_are_refused():
    theta, phi = torch.ones(2, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, requires_grad=True)
    problem = BilevelProblem(lambda: (theta * phi).square().sum(), theta.sum, [theta], [phi])
    with pytest.raises(ConfigurationError, match=r"less than torch\.bfloat16 can hold"):
        Neumann(step_size=0.1, product=FiniteDifference())(problem)
    with pytest.raises(ConfigurationError, match="`scheme` must be forward or central"):
        FiniteDifference("backward")
