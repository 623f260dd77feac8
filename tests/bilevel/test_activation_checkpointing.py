"""Activation checkpointing: the same derivatives of both orders, less memory, and errors in place of wrong ones."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
)

from diopt_lightning.bilevel import (
    BilevelProblem,
    Chebyshev,
    DoubleBackward,
    FiniteDifference,
    GaussNewton,
    Identity,
    MicroBatches,
    ReverseOverForward,
    Spectrum,
    checkpoint_activations,
    needs_second_derivatives,
)
from diopt_lightning.bilevel.products.second_order import second_order
from diopt_lightning.errors import ConfigurationError
from tests.bilevel.problems import flat, randn, relative_error
from tests.bilevel.test_products import OnceDifferentiable, random_vector
from tests.memory import peak_memory
from tests.tolerances import Error


class Block(nn.Module):
    """A residual block with dropout, tied weights, and a bias that the first block makes for all, as in T5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)
        self.after.weight = self.before.weight
        self.scale = nn.Parameter(torch.ones(width))
        self.dropout = nn.Dropout(0.3)
        self.runs = 0
        self.precision: set[torch.dtype] = set()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None, *, sizes: tuple[Tensor, float]
    ) -> tuple[Tensor, Tensor, None]:
        self.runs += 1
        bias = self.scale.cumsum(0) if bias is None else bias
        hidden = self.dropout((self.before(x) + bias).tanh())
        hidden = hidden if mask is None else hidden * mask
        hidden = self.after(hidden)
        self.precision.add(hidden.dtype)
        return x + sizes[1] * hidden * sizes[0], bias, None


class Stack(nn.Module):
    """Blocks, one after the other, and a head."""

    def __init__(self, width: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask, bias = (torch.arange(x.shape[1]) > 0).to(x.dtype), None
        for block in self.blocks:
            x, bias, _ = block(x, mask, bias, sizes=(x.square(), 0.5))
        return self.head(x)


def stack(dtype: torch.dtype = torch.float64, micro_batches: bool = False) -> tuple[BilevelProblem, Stack]:
    """A weighted classification by a stack in training mode, at once or in two micro-batches."""
    torch.manual_seed(0)
    network = Stack().to(dtype)
    x, y, phi = randn(6, 4, seed=0).to(dtype), torch.arange(6) % 3, randn(6, seed=1).to(dtype).requires_grad_()

    def loss(rows: slice) -> Tensor:
        return (phi[rows].sigmoid() * F.cross_entropy(network(x[rows]), y[rows], reduction="none")).mean()

    inner = MicroBatches([lambda: loss(slice(0, 2)), lambda: loss(slice(2, 6))], [2, 4])
    return BilevelProblem(
        inner if micro_batches else lambda: loss(slice(0, 6)),
        lambda: network(x.flip(0)).square().mean(),
        list(network.parameters()),
        [phi],
    ), network


T5 = T5Config(
    vocab_size=20, d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=2, feed_forward_proj="gated-gelu", pad_token_id=0
)
T5.decoder_start_token_id = 0
LLAMA = LlamaConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
BART = BartConfig(
    vocab_size=20,
    d_model=8,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=12,
    decoder_ffn_dim=12,
    max_position_embeddings=32,
)
GPT2 = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=32)


def blocks_of(model: nn.Module) -> Iterable[nn.Module]:
    """The blocks of a transformer: what stands in its lists of modules, but for those within them."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks_of(child)


def language_model(
    config: PreTrainedConfig, train: bool, trainable: str = "", batch: int = 3, length: int = 6
) -> tuple[BilevelProblem, nn.Module]:
    """A language model with a learned soft prefix, in float64; ``trainable`` is what trained parameters are named."""
    torch.manual_seed(0)
    encoder_decoder = config.is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM).from_config(config)
    model = model.double().train(train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    ids, phi = torch.randint(2, 20, (batch, length)), nn.Parameter(randn(2, config.hidden_size, seed=0))
    mask = (torch.arange(length + 2) < length).expand(batch, -1).clone()
    mask[0] = True

    def loss(rows: slice) -> Tensor:
        prefix = phi.expand(len(ids[rows]), -1, -1)
        embeddings = torch.cat([prefix, model.get_input_embeddings()(ids[rows])], dim=1)
        options = {"inputs_embeds": embeddings, "attention_mask": mask[rows], "use_cache": False}
        if encoder_decoder:
            return model(**options, labels=ids[rows, : length // 2].contiguous()).loss
        return F.cross_entropy(model(**options).logits[:, 2:-1].flatten(0, 1), ids[rows, 1:].flatten())

    parameters = [p for p in model.parameters() if p.requires_grad]
    return BilevelProblem(lambda: loss(slice(None)), lambda: loss(slice(1, None)), parameters, [phi]), model


PROBLEMS: dict[str, tuple[Callable[[], tuple[BilevelProblem, nn.Module]], float]] = {
    "stack": (stack, 1e-12),
    "micro-batches": (lambda: stack(micro_batches=True), 1e-12),
    # These two compute norms in float32, in which a last bit may differ.
    "T5": (lambda: language_model(T5, train=False), 1e-6),
    "Llama": (lambda: language_model(LLAMA, train=False), 1e-6),
    "T5 with dropout": (lambda: language_model(T5, train=True), 1e-6),
    "frozen T5": (lambda: language_model(T5, train=False, trainable="DenseReluDense.wo"), 1e-6),
    "BART": (lambda: language_model(BART, train=False), 1e-12),
    "BART with dropout": (lambda: language_model(BART, train=True), 1e-12),
    "GPT-2": (lambda: language_model(GPT2, train=False), 1e-12),
}


def pair(name: str) -> tuple[BilevelProblem, BilevelProblem]:
    """A problem without and with checkpointing."""
    plain, (checkpointed, model) = PROBLEMS[name][0]()[0], PROBLEMS[name][0]()
    for block in blocks_of(model):
        checkpoint_activations(block)
    return plain, checkpointed


@pytest.mark.parametrize("product", [DoubleBackward, GaussNewton])
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_and_hypergradients_are_the_same(name, product):
    plain, checkpointed = pair(name)
    tolerance, v = PROBLEMS[name][1], random_vector(plain)
    before = torch.get_rng_state()
    with product().linearize(plain) as expected, product().linearize(checkpointed) as found:
        for _ in range(2):
            for a, b in zip(found.both(v), expected.both(v), strict=True):
                assert relative_error(a, flat(b)) < tolerance
        assert relative_error(found.hessian(v), flat(expected.hessian(v))) < tolerance
        assert relative_error(found.gradient(), flat(expected.gradient())) < tolerance
        assert found.inner_loss.item() == pytest.approx(expected.inner_loss.item(), rel=tolerance)
    expected, found = (Chebyshev(products=3, product=product())(problem) for problem in (plain, checkpointed))
    assert relative_error(found.gradient, flat(expected.gradient)) < tolerance
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", PROBLEMS)
def test_first_derivatives_are_the_same(name):
    gradients = []
    for problem in pair(name):
        linearization = FiniteDifference().at(problem)
        gradients.append(flat(linearization.gradient()))
    assert relative_error(gradients[1:], gradients[0]) < PROBLEMS[name][1]


@pytest.mark.parametrize("name", ["stack", "GPT-2"])
def test_differences_of_gradients_are_the_same(name):
    plain, checkpointed = pair(name)
    v = random_vector(plain)
    with FiniteDifference().linearize(plain) as expected, FiniteDifference().linearize(checkpointed) as found:
        for a, b in zip(found.both(v), expected.both(v), strict=True):
            assert relative_error(a, flat(b)) < 1e-8


def test_second_derivatives_are_those_of_differences():
    torch.manual_seed(0)
    network = Stack(width=2, blocks=2).double()
    for block in network.blocks:
        checkpoint_activations(block)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(0)
        with second_order():
            return network(x)

    inputs = (randn(2, 2, seed=0).requires_grad_(), *network.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_modules_run_again_instead_of_keeping_their_activations():
    problem, network = stack()
    block = network.blocks[0].eval()
    checkpoint_activations(block)
    checkpoint_activations(block)
    with DoubleBackward().linearize(problem) as linearization:
        assert block.runs == 2  # for the loss and for its gradient
        linearization.hessian(random_vector(problem))
        assert block.runs == 4  # for the gradient of the gradient, and for that of the loss
    block.runs = 0
    problem.inner_loss().backward()
    assert block.runs == 2
    with torch.no_grad():
        problem.inner_loss()
    assert block.runs == 3


# With an accuracy of its own, which the estimate of the spectrum, rounded too, has no part in.
ESTIMATOR = partial(Chebyshev, products=3, accuracy=0.1)


@pytest.mark.parametrize("outside", [False, True])
def test_precision_is_that_of_the_forward_pass(outside):
    gradients, estimates = [], []
    for checkpointed in (False, True):
        problem, network = stack(torch.float32)
        for block in network.blocks if checkpointed else []:
            checkpoint_activations(block)

        def loss(problem: BilevelProblem = problem) -> Tensor:
            # A cast that several uses share would also share the rounding of their gradients.
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return problem.inner_loss()

        cast = BilevelProblem(loss, loss, problem.inner_parameters, problem.outer_parameters)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside, cache_enabled=False):
            with DoubleBackward().linearize(cast) as linearization:
                gradients.append(flat(linearization.gradient()))
            estimates.append(flat(ESTIMATOR()(cast).gradient))
        assert {dtype for block in network.blocks for dtype in block.precision} == {torch.bfloat16}
    assert relative_error(gradients[1:], gradients[0]) < 1e-6
    full = BilevelProblem(problem.inner_loss, problem.inner_loss, problem.inner_parameters, problem.outer_parameters)
    exact = flat(ESTIMATOR()(full).gradient)
    # Second derivatives are sums of more terms, and their order differs: by less than the precision costs.
    assert 0 < Error((estimates[1] - estimates[0]).norm()) < 0.2 * (estimates[0] - exact).norm()


def test_copies_compute_with_their_own_parameters():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    checkpoint_activations(layer)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.weight)
    assert torch.equal(other(x)[0], other.bias)
    other(x).sum().backward()
    assert layer.weight.grad is None
    assert other.weight.grad is not None


def test_what_passes_through_is_the_same_tensor():
    block, x, bias = Block(2), torch.ones(1, 2), torch.zeros(2, requires_grad=True)
    checkpoint_activations(block)
    with second_order():
        outputs = block(x, None, bias, sizes=(x, 1.0))
    assert outputs[1] is bias
    assert outputs[2] is None


def test_losses_can_ask_for_the_order_of_their_derivatives():
    theta, phi, orders = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True), []

    def loss() -> Tensor:
        orders.append(needs_second_derivatives())
        return (theta * phi).square().sum()

    Identity()(BilevelProblem(loss, loss, [theta], [phi]))
    assert orders == [False, True]
    assert not needs_second_derivatives()


def test_generation_keeps_its_cache():
    model = AutoModelForCausalLM.from_config(LLAMA).eval()
    ids = torch.randint(2, 20, (1, 3))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    for block in blocks_of(model):
        checkpoint_activations(block)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    with pytest.raises(ConfigurationError, match=r"LlamaDecoderLayer .* DynamicCache.* `use_cache=False`"):
        model(ids, use_cache=True)


def test_forward_mode_is_refused():
    problem, network = stack()
    checkpoint_activations(network.blocks[1])
    with pytest.raises(ConfigurationError, match=r"Block is checkpointed.* use `DoubleBackward`"):
        Identity(product=ReverseOverForward())(problem)


class Unfriendly(nn.Module):
    """A layer that cannot be computed again, or not be differentiated twice, each in its own way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer = nn.Linear(3, 3)
        self.hidden = torch.zeros(3, requires_grad=True)

    def forward(self, x: Tensor) -> object:
        if self.way == "once differentiable":
            return OnceDifferentiable.apply(self.layer(x))
        if self.way == "another tensor":
            return self.layer(x) + self.hidden.exp()
        return {self.layer(x)}


@pytest.mark.parametrize("product", [DoubleBackward, GaussNewton])
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("once differentiable", "marked as differentiable only once"),
        ("another tensor", r"uses a tensor of shape \(3,\) that requires a gradient"),
        ("an object", "an object of type set"),
    ],
)
def test_what_would_be_wrong_is_an_error(way, message, product):
    module, phi, x = Unfriendly(way), torch.zeros(3, requires_grad=True), torch.randn(2, 3)
    checkpoint_activations(module)

    def loss() -> Tensor:
        outputs = module(x * phi.exp())
        return F.mse_loss(outputs.pop() if isinstance(outputs, set) else outputs, x)

    problem = BilevelProblem(loss, lambda: module.layer.weight.sum(), list(module.layer.parameters()), [phi])
    with pytest.raises(ConfigurationError, match=message):
        Identity(product=product())(problem)


LARGER = {"vocab_size": 50, "num_layers": 6, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(T5Config(**LARGER, feed_forward_proj="gated-gelu", decoder_start_token_id=0), id="T5"),
        pytest.param(
            LlamaConfig(
                vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=8, num_attention_heads=4
            ),
            id="Llama",
        ),
    ],
)
def test_a_hypergradient_takes_much_less_memory(config):
    problem, model = language_model(config, train=False, batch=8, length=32)

    def hypergradient() -> None:
        Chebyshev(products=5, spectrum=Spectrum(products=2))(problem)

    plain = peak_memory(hypergradient)
    for block in blocks_of(model):
        checkpoint_activations(block)
    assert peak_memory(hypergradient) < 0.4 * plain


def test_memory_is_measured_exactly():
    def function() -> Tensor:
        first = torch.zeros(1000)
        del first
        second, third = torch.zeros(500), torch.zeros(1500)
        return second + third.sum()

    assert 8000 < peak_memory(function) < 10200
