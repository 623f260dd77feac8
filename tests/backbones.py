"""The one list of backbones and of the families of models behind them, and what must hold of each.

A new backbone is one line of ``BACKBONES``. One that is not part of the package is put through the same by

    for check in CHECKS:
        check(lambda **options: MyBackbone(...))
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diopt_lightning.backbones import Backbone, Causal, InnerParameters, RandomCausal, RandomSeq2Seq, Seq2Seq
from diopt_lightning.bilevel import BilevelProblem, DoubleBackward, FiniteDifference, Neumann
from diopt_lightning.data.collate import IGNORED_LABEL, Batch, pad
from diopt_lightning.data.synthetic import WORDS, word_tokenizer
from diopt_lightning.data.text_format import encode
from diopt_lightning.instructions.base import InstructionEmbeddings
from tests.conftest import TINY_T5
from tests.helpers import InDouble

DECODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = DECODER | {"num_key_value_heads": 1, "head_dim": 8}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
FAMILIES = {
    "t5": TINY_T5,
    "umt5": TINY_T5 | {"model_type": "umt5"},
    "bart": BART | {"model_type": "bart", "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0}
    | {"embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": GROUPED | {"model_type": "llama"},
    "qwen2": DECODER | {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": GROUPED | {"model_type": "qwen3"},
    "gemma": GROUPED | {"model_type": "gemma"},
    "gemma2": GROUPED | {"model_type": "gemma2"},
    "gemma3": GROUPED | {"model_type": "gemma3_text"},
}
CAUSAL = [name for name in FAMILIES if name not in ("t5", "umt5", "bart")]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
Make = Callable[..., Backbone]


def some_tokenizer() -> Any:
    return word_tokenizer([*WORDS, "user", "assistant", "name", "the"])


def drawn(family: str) -> Make:
    """Makes a backbone of a family with random weights."""
    kind = RandomCausal if family in CAUSAL else RandomSeq2Seq
    return lambda **options: kind(dict(FAMILIES[family]), **options)


def loaded(kind: Callable[..., Backbone], family: str) -> Make:
    """Makes a backbone from a folder, which has a model of a family with random weights."""

    def make(**options: Any) -> Backbone:
        random: Any = drawn(family)()
        random.build(some_tokenizer())
        folder = tempfile.mkdtemp(dir=".")  # the test's own
        random.model.save_pretrained(folder)
        return kind(folder, **options)

    return make


BACKBONES: dict[str, Make] = {
    **{family: drawn(family) for family in FAMILIES},
    "pretrained_t5": loaded(Seq2Seq, "t5"),
    "pretrained_llama": loaded(Causal, "llama"),
}


def made(make: Make | str, tokenizer: Any, inner_parameters: InnerParameters | None = None, **options: Any) -> Any:
    """A built backbone, by its maker or its name in the list, whose model does look at its input."""
    if inner_parameters is not None:
        options["inner_parameters"] = inner_parameters
    backbone = (BACKBONES[make] if isinstance(make, str) else make)(**options)
    backbone.build(tokenizer)
    with torch.no_grad():  # as drawn, some models hardly look at their input
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for module in backbone.modules():  # as drawn and as trained; some families tell padding by it
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    return backbone


def rows(backbone: Backbone, tokenizer: Any, texts: list[str], targets: list[str]) -> Batch:
    text_format = backbone.text_format(tokenizer)
    sources = [text_format.source(tokenizer, text, 64)[0] for text in texts]
    labels = [text_format.target(tokenizer, text, 64)[0] for text in targets]
    mask = pad([[1] * len(row) for row in sources], 0)
    zeros = torch.zeros(len(texts), dtype=torch.long)
    return Batch(pad(sources, tokenizer.pad_token_id), mask, pad(labels, IGNORED_LABEL), zeros, zeros)


def written(texts: list[str], tokenizer: Any, backbone: Backbone) -> InstructionEmbeddings:
    """Texts as instructions, with gaps and padding where a learned one may have them."""
    ids = [encode(tokenizer, text) for text in texts]
    longest = max(map(len, ids)) + 2
    width = backbone.embedding.embedding_dim
    embeddings, mask = torch.randn(len(ids), longest, width), torch.zeros(len(ids), longest, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        places = [0, *range(2, len(tokens) + 1)][: len(tokens)]
        embeddings[row, places] = backbone.embed(torch.tensor(tokens)).detach()
        mask[row, places] = True
    return InstructionEmbeddings(embeddings, mask)


INSTRUCTIONS = [" ".join(WORDS[:4]), WORDS[9], " ".join(WORDS[20:22])]
TEXTS = [" ".join(WORDS[30:36]), WORDS[40], " ".join(WORDS[42:45])]
TARGETS = [WORDS[3], " ".join(WORDS[5:8]), WORDS[11]]


def check_instructions_are_read_as_text(make: Make, tokenizer: Any = None) -> None:
    """Instruction embeddings are to the model what their text is, in losses and in what is generated."""
    tokenizer = tokenizer or some_tokenizer()
    backbone = made(make, tokenizer)
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    joined = rows(backbone, tokenizer, [f"{i} {t}" for i, t in zip(INSTRUCTIONS, TEXTS, strict=True)], TARGETS)
    instruction = written(INSTRUCTIONS, tokenizer, backbone)
    with torch.no_grad():
        assert torch.allclose(backbone.loss(batch, instruction), backbone.loss(joined), atol=1e-5)
        backbone.eval()
        outputs = backbone.generate(batch, 5, instruction), backbone.generate(joined, 5)
    assert torch.equal(*outputs)


def check_losses_do_not_depend_on_other_rows(make: Make) -> None:
    """The loss of each row is that of the row alone, without padding, and the loss their mean over all targets."""
    tokenizer = some_tokenizer()
    backbone = made(make, tokenizer)
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    assert batch.labels[0, -1] == IGNORED_LABEL  # there is padding among the targets
    with torch.no_grad():
        together = backbone.target_losses(batch, None)
        alone = [
            backbone.target_losses(rows(backbone, tokenizer, [text], [target]), None)
            for text, target in zip(TEXTS, TARGETS, strict=True)
        ]
        assert torch.allclose(together, torch.cat(alone), rtol=1e-5)
        assert torch.allclose(backbone.loss(batch), together.sum() / (batch.labels != IGNORED_LABEL).sum())
        tenth, half = (backbone.target_losses(batch, None, share) - together for share in (0.1, 0.5))
        assert half.abs().max() > 1e-3  # label smoothing is heard, and is linear
        assert torch.allclose(5 * tenth, half, rtol=1e-3, atol=1e-4)  # differences of losses near 5 in float32


def check_generation_does_not_depend_on_other_rows(make: Make) -> None:
    """What is generated for each row is what is generated for it alone, with an instruction and without."""
    tokenizer = some_tokenizer()
    backbone = made(make, tokenizer).eval()
    instruction = written(INSTRUCTIONS, tokenizer, backbone)
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    for given in (None, instruction):
        together = backbone.generate(batch, 6, given)
        for row in range(len(TEXTS)):
            text = rows(backbone, tokenizer, TEXTS[row : row + 1], TARGETS[row : row + 1])
            own = InstructionEmbeddings(*(column[row : row + 1] for column in given[:2])) if given else None
            alone = backbone.generate(text, 6, own)[0].tolist()
            assert together[row].tolist()[: len(alone)] == alone
            assert set(together[row].tolist()[len(alone) :]) <= {tokenizer.pad_token_id}


def check_generation_is_what_is_predicted(make: Make) -> None:
    """Each token that is generated has the least loss of all that could stand there."""
    tokenizer = some_tokenizer()
    backbone = made(make, tokenizer).eval()
    batch, instruction = (
        rows(backbone, tokenizer, TEXTS[:1], TARGETS[:1]),
        written(INSTRUCTIONS[:1], tokenizer, backbone),
    )
    every = torch.arange(len(tokenizer))

    def repeated(column: Tensor) -> Tensor:
        return column.expand(len(every), *column.shape[1:])

    for given in (None, instruction):
        tokens = backbone.generate(batch, 4, given)[0, int(backbone.is_encoder_decoder) :]
        ended = (tokens == tokenizer.eos_token_id).nonzero()
        for place in range(int(ended[0]) + 1 if len(ended) else len(tokens)):
            labels = torch.cat([tokens[:place].expand(len(every), -1), every.unsqueeze(1)], dim=1)
            own = InstructionEmbeddings(*map(repeated, given[:2])) if given else None
            with torch.no_grad():
                losses = backbone.target_losses(Batch(*map(repeated, batch))._replace(labels=labels), own)
            assert losses[tokens[place]] - losses.min() < 1e-4


def check_gradients(make: Make) -> None:
    """Gradients and hypergradients are right in float64."""
    tokenizer = some_tokenizer()
    backbone = made(make, tokenizer).double()
    batch = rows(backbone, tokenizer, TEXTS[:2], TARGETS[:2])
    phi = nn.Parameter(0.3 * torch.randn(2, 2, backbone.embedding.embedding_dim, dtype=torch.float64))
    mask = torch.ones(2, 2, dtype=torch.bool)

    def loss(phi: Tensor) -> Tensor:
        return backbone.loss(batch, InstructionEmbeddings(phi, mask))

    theta = [p for p in backbone.parameters() if p.numel() < 600]
    with InDouble():
        assert torch.autograd.gradcheck(loss, phi, fast_mode=True)
        problem = BilevelProblem(lambda: loss(phi), lambda: backbone.loss(batch), theta, [phi])
        exact = Neumann(terms=2, step_size=1e-3, product=DoubleBackward())(problem).gradient[0]
        obvious = Neumann(terms=2, step_size=1e-3, product=FiniteDifference(scheme="central"))(problem).gradient[0]
    assert exact.norm() > 0
    assert torch.allclose(exact, obvious, atol=1e-5 * float(exact.norm()))


def check_build(make: Make) -> None:
    """A model is made once, in training mode, and embeds tokens in float32 at least."""
    backbone, tokenizer = make(), some_tokenizer()
    backbone.build(tokenizer)
    assert all(module.training for module in backbone.modules())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.build(tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.embed(torch.tensor([[3, 4]])).shape == (1, 2, backbone.embedding.embedding_dim)
    assert set(backbone.frozen_names()) <= dict(backbone.named_parameters(remove_duplicate=False)).keys()


CHECKS = [
    check_instructions_are_read_as_text,
    check_losses_do_not_depend_on_other_rows,
    check_generation_does_not_depend_on_other_rows,
    check_generation_is_what_is_predicted,
    check_gradients,
    check_build,
]
