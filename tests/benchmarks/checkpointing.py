"""What activation checkpointing saves in memory and costs in time, in an exact hypergradient.

Run ``python -m tests.benchmarks.checkpointing`` in the repository's root; it takes about two minutes on one core.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from diopt_lightning.bilevel import BilevelProblem, Chebyshev, checkpoint_activations
from tests.benchmarks.costs import seconds
from tests.memory import peak_memory

ROUNDS = 5
WIDTH = 64


def a_t5() -> tuple[BilevelProblem, list[nn.Module]]:
    """A T5 of 6 and 6 blocks, on 16 instances of 72 tokens."""
    config = T5Config(
        vocab_size=500,
        d_model=WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    phi, ids, labels = prefix(), torch.randint(2, 500, (16, 64)), torch.randint(2, 500, (16, 16))

    def loss() -> Tensor:
        value: Tensor = model(inputs_embeds=embedded(model, phi, ids), labels=labels, use_cache=False).loss
        return value

    blocks = [*model.encoder.block, *model.decoder.block]
    return BilevelProblem(loss, loss, list(model.parameters()), [phi]), blocks


def a_llama() -> tuple[BilevelProblem, list[nn.Module]]:
    """A Llama of 8 blocks, on 16 instances of 72 tokens."""
    config = LlamaConfig(
        vocab_size=500, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    phi, ids = prefix(), torch.randint(2, 500, (16, 64))

    def loss() -> Tensor:
        logits = model(inputs_embeds=embedded(model, phi, ids), use_cache=False, logits_to_keep=17).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, -16:].flatten())

    return BilevelProblem(loss, loss, list(model.parameters()), [phi]), list(model.model.layers)


def prefix() -> Tensor:
    """A soft prefix."""
    return torch.randn(8, WIDTH, requires_grad=True)


def embedded(model: nn.Module, phi: Tensor, ids: Tensor) -> Tensor:
    """The embeddings of instances after a soft prefix."""
    return torch.cat([phi.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)


def row(name: str, make: Callable[[], tuple[BilevelProblem, list[nn.Module]]]) -> str:
    """Measure one model, with and without, in interleaved rounds."""
    (plain, _), (checkpointed, blocks) = make(), make()
    for block in blocks:
        checkpoint_activations(block)
    problems = (plain, checkpointed)
    # The first hypergradient also estimates the spectrum, once for many.
    estimators = [Chebyshev(products=5) for _ in problems]
    pairs = list(zip(estimators, problems, strict=True))
    gradients = [torch.cat([entry.flatten() for entry in estimate(problem).gradient]) for estimate, problem in pairs]
    difference = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    memory = [peak_memory(lambda pair=pair: pair[0](pair[1])) / 2**20 for pair in pairs]  # type: ignore[misc]
    times = [[seconds(lambda pair=pair: pair[0](pair[1])) for pair in pairs] for _ in range(ROUNDS)]  # type: ignore[misc]
    ratios = sorted(after / before for before, after in times)
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    return (
        f"| {name} | {memory[0]:.0f} → {memory[1]:.0f} | {memory[1] / memory[0]:.2f} | {before:.2f} → {after:.2f} | "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {difference:.0e} |"
    )


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| model | peak memory, MiB | ratio | time, s | ratio | relative difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, make in (("T5", a_t5), ("Llama", a_llama)):
        print(row(name, make), flush=True)


if __name__ == "__main__":
    main()
