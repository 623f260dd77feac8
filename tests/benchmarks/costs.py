"""What products cost in plain gradients and in saved activations, as a table for the package's documentation.

Run ``python -m tests.benchmarks.costs`` in the repository's root; it takes about a minute on one core.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from diopt_lightning.bilevel import (
    BilevelProblem,
    DoubleBackward,
    FiniteDifference,
    GaussNewton,
    Product,
    ReverseOverForward,
)
from tests.benchmarks.hypergradients import README, between

ROUNDS = 9
PRODUCTS: dict[str, Product] = {
    "`DoubleBackward`": DoubleBackward(),
    "`ReverseOverForward`": ReverseOverForward(),
    "`GaussNewton`": GaussNewton(),
    "`FiniteDifference('forward')`": FiniteDifference("forward", check=False),
    "`FiniteDifference('central')`": FiniteDifference("central", check=False),
}


def problem_of_a_small_t5() -> BilevelProblem:
    """A T5 of 1.2 million parameters with a soft prefix, on 16 instances of 40 tokens."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=500,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    phi = torch.randn(8, 128, requires_grad=True)
    ids, labels = torch.randint(2, 500, (16, 32)), torch.randint(2, 500, (16, 16))

    def inner_loss() -> Tensor:
        embeddings = torch.cat([phi.expand(16, -1, -1), model.get_input_embeddings()(ids)], dim=1)
        loss: Tensor = model(inputs_embeds=embeddings, labels=labels).loss
        return loss

    return BilevelProblem(inner_loss, inner_loss, list(model.parameters()), [phi])


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def saved_bytes(function: Callable[[], object]) -> int:
    """Memory of the distinct tensors that autograd saves for a later backward pass."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no two of them share an address one after the other
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


def main() -> None:
    """Measure in interleaved rounds, print the table and write it."""
    torch.set_num_threads(1)
    problem = problem_of_a_small_t5()
    parameters = [*problem.inner_parameters, *problem.outer_parameters]
    v = [torch.randn_like(parameter) for parameter in problem.inner_parameters]

    def gradient() -> None:
        torch.autograd.grad(problem.inner_loss(), parameters)

    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PRODUCTS}
    for _ in range(ROUNDS):
        for name, product in PRODUCTS.items():
            base = seconds(gradient)
            with ExitStack() as stack:
                start = time.perf_counter()
                linearization = stack.enter_context(product.linearize(problem))
                built = time.perf_counter() - start
                hessian = seconds(partial(linearization.hessian, v))
                both = seconds(partial(linearization.both, v))
            times[name].append((built / base, hessian / base, both / base))

    own = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
    plain = saved_bytes(gradient) - own
    rows = ["| product | to begin | `hessian(v)` | `both(v)` | saved for backward |", "|---|---|---|---|---|"]
    for name, product in PRODUCTS.items():
        begin, hessian, both = (statistics.median(column) for column in zip(*times[name], strict=True))

        def once(product: Product = product) -> None:
            with product.linearize(problem) as linearization:
                linearization.both(v)

        memory = (saved_bytes(once) - own) / plain
        rows.append(f"| {name} | {begin:.1f} | {hessian:.1f} | {both:.1f} | {memory:.1f} |")
    table = "\n".join(rows)
    print(table)
    README.write_text(between(README.read_text(encoding="utf-8"), "costs", table), encoding="utf-8")


if __name__ == "__main__":
    main()
