"""What products cost in plain gradients, in time and in memory, as a table for the package's documentation.

Run ``python -m tests.benchmarks.costs`` in the repository's root; it takes about a minute on one core.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

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
    """A T5 of 1.2 million parameters with a soft prefix, on 32 instances of 72 tokens."""
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
    ids, labels = torch.randint(2, 500, (32, 64)), torch.randint(2, 500, (32, 16))

    def inner_loss() -> Tensor:
        embeddings = torch.cat([phi.expand(32, -1, -1), model.get_input_embeddings()(ids)], dim=1)
        loss: Tensor = model(inputs_embeds=embeddings, labels=labels).loss
        return loss

    return BilevelProblem(inner_loss, inner_loss, list(model.parameters()), [phi])


def one_product(product: Product, problem: BilevelProblem, v: list[Tensor]) -> None:
    """Linearize and take the product that ends a hypergradient."""
    with product.linearize(problem) as linearization:
        linearization.both(v)


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], object]) -> float:
    """Memory that a call needs at its peak beside what is there before, in bytes, seen in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measure() -> None:
        before = resident_memory()
        function()
        sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)

    process = context.Process(target=measure)
    process.start()
    peak: float = receiver.recv()
    process.join()
    return peak


def resident_memory() -> int:
    """Memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Measure in interleaved rounds, print the table and write it."""
    torch.set_num_threads(1)
    problem = problem_of_a_small_t5()
    parameters = [*problem.inner_parameters, *problem.outer_parameters]
    v = [torch.randn_like(parameter) for parameter in problem.inner_parameters]

    def gradient() -> None:
        torch.autograd.grad(problem.inner_loss(), parameters)

    # First of all, while this process has no freed memory that its children would fill again unseen.
    plain = peak_memory(gradient)
    memory = {
        name: peak_memory(partial(one_product, product, problem, v)) / plain for name, product in PRODUCTS.items()
    }
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

    rows = ["| product | to begin | `hessian(v)` | `both(v)` | peak memory |", "| --- | --- | --- | --- | --- |"]
    for name in PRODUCTS:
        begin, hessian, both = (statistics.median(column) for column in zip(*times[name], strict=True))
        rows.append(f"| {name} | {begin:.1f} | {hessian:.1f} | {both:.1f} | {memory[name]:.1f} |")
    table = "\n".join(rows)
    print(table)
    README.write_text(between(README.read_text(encoding="utf-8"), "costs", table), encoding="utf-8")


if __name__ == "__main__":
    main()
