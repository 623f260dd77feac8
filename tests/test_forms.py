"""Every form of instruction: what must hold of all, against slow and obvious versions, and refused where wrong."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

import diopt_lightning.instructions
from diopt_lightning import ConfigurationError
from diopt_lightning.backbones import RandomSeq2Seq
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.synthetic import WORDS
from diopt_lightning.data.tasks import Example, Instance, Task
from diopt_lightning.instructions import (
    Annealed,
    CandidatePool,
    Composition,
    EmbedderDP,
    EmbedderFromDefinition,
    EmbedderIC,
    Exemplar,
    ExpectedLoss,
    ExtractorDP,
    ExtractorIC,
    FixedExemplar,
    GumbelStraightThrough,
    Instruction,
    Linear,
    Normal,
    Pooled,
    RandomExemplar,
    SharedInCategory,
    Soft,
    StraightThrough,
    TaskWeights,
    TokenWise,
    Transformer,
    Vocabulary,
)
from diopt_lightning.instructions.base import Embed, InstructionEmbeddings
from diopt_lightning.instructions.conversion import unit_scale
from tests.conftest import TINY_T5
from tests.forms import (
    CHECKS,
    FORMS,
    INPUTS,
    Form,
    batch_of,
    built,
    check_description,
    check_gradient,
    check_what_is_left,
    some_tasks,
    some_tokenizer,
)
from tests.helpers import concrete_classes
from tests.tolerances import Error

ANNOTATED = CandidatePool(instances=False)
EMBEDDING = nn.Embedding(2000, 4)


@pytest.fixture
def tokenizer():
    return some_tokenizer()


@pytest.fixture
def tasks():
    return some_tasks()


@pytest.fixture
def backbone(tokenizer):
    backbone = RandomSeq2Seq(dict(TINY_T5))
    backbone.build(tokenizer)
    return backbone


# Whole runs of one form of each class are quick tests, those of its variants are slow ones.
FIRST = {type(form.make()): name for name, form in reversed(FORMS.items())}.values()


def marked(form: str, check: Any) -> Any:
    slow = form not in FIRST and check not in (check_gradient, check_description)
    return pytest.param(form, check, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("form", "check"), [marked(form, check) for form in FORMS for check in CHECKS])
def test_what_holds_of_every_form(form, check, tmp_path):
    check(FORMS[form], tmp_path)


def test_the_list_of_forms_is_complete():
    listed = {type(form.make()) for form in FORMS.values()}
    assert listed == set(concrete_classes(diopt_lightning.instructions, Instruction))


class Doubled(EmbedderIC):
    """A user's form that makes an instruction of each instance."""

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        found = super().forward(batch, embed)
        return found._replace(embeddings=2 * found.embeddings)


class Sharpened(ExtractorIC):
    """A user's form that chooses for each instance."""

    def scores(self, batch: Batch, embed: Embed) -> Tensor:
        return 2 * super().scores(batch, embed)


class Bounded(EmbedderDP):
    """A user's form whose instructions are not its parameter as it is."""

    def task_embeddings(self, embed: Embed) -> list[Tensor]:
        return list(self.weight.detach().tanh())

    def forward(self, batch: Batch, embed: Embed) -> InstructionEmbeddings:
        found = super().forward(batch, embed)
        return found._replace(embeddings=found.embeddings.tanh())


@pytest.mark.parametrize("check", [check_description, check_what_is_left])
@pytest.mark.parametrize(
    "form",
    [
        Form(lambda: Doubled(Linear(length=2))),
        Form(lambda: Sharpened(1, 3, 32, ANNOTATED, Soft())),
        Form(lambda: Bounded(length=2)),
    ],
    ids=["doubled", "sharpened", "bounded"],
)
def test_the_same_holds_of_a_form_of_ones_own(form, check, tmp_path):
    check(form, tmp_path)


def tokens_of(tokenizer: Any, batch: Batch, row: int) -> list[int]:
    """Source and target of an instance, without padding."""
    source = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
    return source + batch.labels[row][batch.labels[row] != -100].tolist()


def rms(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + torch.finfo(vector.dtype).eps).sqrt()


def test_pooled_conversion_equals_the_obvious_loop(tokenizer, tasks, backbone):
    embedder = built(EmbedderIC(Linear(length=3, encoding=Pooled(hidden=4))), tasks, tokenizer, backbone)
    batch, weight = batch_of(tokenizer, INPUTS, [0, 1, 2]), backbone.embedding.weight
    found = embedder(batch, backbone.embedding)
    first, _, second = embedder.conversion.encoding.layers
    for row in range(3):
        mean = sum(weight[token] for token in tokens_of(tokenizer, batch, row)) / len(tokens_of(tokenizer, batch, row))
        encoded = second.weight @ (first.weight @ mean + first.bias).clamp(min=0) + second.bias
        expected = embedder.conversion.map.weight @ rms(encoded) + embedder.conversion.map.bias
        assert torch.allclose(found.embeddings[row].flatten(), expected, atol=1e-4, rtol=1e-4)
    assert found.mask.all()


@pytest.mark.parametrize("relu", [False, True])
def test_token_wise_conversion_equals_the_obvious_loop(tokenizer, tasks, backbone, relu):
    embedder = built(EmbedderIC(TokenWise(max_length=8, relu=relu)), tasks, tokenizer, backbone)
    batch, weight = batch_of(tokenizer, INPUTS, [0, 1, 2]), backbone.embedding.weight
    found = embedder(batch, backbone.embedding)
    for row in range(3):
        tokens = tokens_of(tokenizer, batch, row)[:8]
        assert found.mask[row].tolist() == [True] * len(tokens) + [False] * (found.mask.shape[1] - len(tokens))
        for position, token in enumerate(tokens):
            vector = rms(weight[token])
            vector = vector.clamp(min=0) if relu else vector
            expected = embedder.conversion.map.weight @ vector + embedder.conversion.map.bias
            assert torch.allclose(found.embeddings[row, position], expected, atol=1e-4, rtol=1e-4)


def test_bilinear_scores_equal_the_obvious_loop(tokenizer, tasks, backbone):
    extractor = built(ExtractorIC(2, 4, 32, ANNOTATED), tasks, tokenizer, backbone)
    batch, weight = batch_of(tokenizer, INPUTS, [2, 0, 2]), backbone.embedding.weight
    found = extractor.scores(batch, backbone.embedding)
    for row, task in enumerate([2, 0, 2]):
        tokens = tokens_of(tokenizer, batch, row)
        instance = rms(sum(weight[token] for token in tokens) / len(tokens))
        for j, text in enumerate(extractor.candidate_texts[task]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            candidate = rms(sum(weight[token] for token in ids) / len(ids))
            for slot in range(2):
                expected = candidate @ extractor.bilinear[slot] @ instance / 16
                assert torch.allclose(found[row, slot, j], expected, atol=1e-4, rtol=1e-4)
    assert torch.isinf(found[:, :, 3]).all()  # these tasks have three annotated examples


def attended(layer: nn.TransformerEncoderLayer, x: Tensor, heads: int) -> Tensor:
    """Self-attention of one sequence ``(length, dim)``, head by head and position by position."""
    attention, size = layer.self_attn, x.shape[1] // heads
    query, key, value = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
    rows = []
    for position in range(len(x)):
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[position, part] @ key[other, part] for other in range(len(x))]) / size**0.5
            mixed.append(sum(p * value[other, part] for other, p in enumerate(scores.softmax(0))))
        rows.append(attention.out_proj.weight @ torch.cat(mixed) + attention.out_proj.bias)
    return torch.stack(rows)


def test_transformer_encoding_equals_the_obvious_loop(tokenizer, tasks, backbone):
    embedder = built(EmbedderIC(Linear(length=2, encoding=Transformer(heads=2))), tasks, tokenizer, backbone)
    batch, (layer,) = batch_of(tokenizer, INPUTS, [0, 1, 2]), embedder.conversion.encoding.encoder.layers
    found = embedder(batch, backbone.embedding)
    for row in range(3):
        x = backbone.embedding.weight[tokens_of(tokenizer, batch, row)]
        x = x + attended(layer, layer.norm1(x), heads=2)
        x = x + layer.linear2(layer.linear1(layer.norm2(x)).clamp(min=0))
        expected = embedder.conversion.map(rms(x.mean(0)))
        assert torch.allclose(found.embeddings[row].flatten(), expected, atol=1e-4, rtol=1e-4)


def test_conversion_of_what_an_encoder_makes_of_each_token_equals_the_obvious_loop(tokenizer, tasks, backbone):
    embedder = built(EmbedderIC(TokenWise(8, encoder=Transformer(heads=2))), tasks, tokenizer, backbone)
    batch, (layer,) = batch_of(tokenizer, INPUTS, [0, 1, 2]), embedder.conversion.encoder.encoder.layers
    found = embedder(batch, backbone.embedding)
    for row in range(3):
        x = backbone.embedding.weight[tokens_of(tokenizer, batch, row)[:8]]
        x = x + attended(layer, layer.norm1(x), heads=2)
        x = x + layer.linear2(layer.linear1(layer.norm2(x)).clamp(min=0))
        expected = torch.stack([embedder.conversion.map.weight @ rms(vector) for vector in x])
        expected = expected + embedder.conversion.map.bias
        assert torch.allclose(found.embeddings[row][found.mask[row]], expected, atol=1e-4, rtol=1e-4)


def test_conversion_of_definitions_equals_the_obvious_loop_on_seen_and_unseen_tasks(tokenizer, tasks, backbone):
    embedder = EmbedderFromDefinition(TokenWise(max_length=6))
    embedder.build(tasks[:2], tokenizer, backbone.embedding, tasks[2:])
    batch = batch_of(tokenizer, INPUTS, [2, 0, 2])
    found, map = embedder(batch, backbone.embedding), embedder.conversion.map
    for row, task in enumerate([2, 0, 2]):
        tokens = tokenizer(f"Definition: {tasks[task].definitions[0]}.\n\n", add_special_tokens=False)["input_ids"][:6]
        expected = torch.stack([map.weight @ rms(backbone.embedding.weight[token]) + map.bias for token in tokens])
        assert torch.allclose(found.embeddings[row][found.mask[row]], expected, atol=1e-4, rtol=1e-4)
    of_tasks = embedder.task_embeddings(backbone.embedding)
    assert torch.allclose(of_tasks[0], found.embeddings[1][found.mask[1]], atol=1e-6)
    assert len(of_tasks) == 2
    assert embedder.works_on_unseen_tasks


@pytest.mark.parametrize("encoding", [Pooled(hidden=4), Transformer(heads=2)], ids=["pooled", "transformer"])
def test_padding_changes_no_encoding(tokenizer, tasks, backbone, encoding):
    embedder = built(EmbedderIC(Linear(length=2, encoding=encoding)), tasks, tokenizer, backbone)
    together = embedder(batch_of(tokenizer, INPUTS, [0, 1, 2]), backbone.embedding).embeddings
    for row, text in enumerate(INPUTS):
        alone = batch_of(tokenizer, [text], [row])
        alone.labels[0] = batch_of(tokenizer, INPUTS, [0, 1, 2]).labels[row]
        assert torch.allclose(embedder(alone, backbone.embedding).embeddings[0], together[row], atol=1e-5)


def test_a_pretrained_encoder_converts_from_a_local_folder(tokenizer, tasks, backbone, tmp_path):
    size = backbone.embedding.num_embeddings
    config = T5Config(vocab_size=size, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "encoder")
    encoding = Transformer(pretrained=str(tmp_path / "encoder"))
    embedder = built(EmbedderIC(Linear(length=2, encoding=encoding)), tasks, tokenizer, backbone)
    batch = batch_of(tokenizer, INPUTS, [0, 1, 2])
    assert embedder(batch, backbone.embedding).embeddings.shape == (3, 2, 16)
    encoder = Transformer(pretrained=str(tmp_path / "encoder"))
    embedder = built(EmbedderIC(TokenWise(64, encoder=encoder)), tasks, tokenizer, backbone)
    found, map = embedder(batch, backbone.embedding), embedder.conversion.map
    for row in range(3):  # one after the other, without padding
        states = encoder.encoder(input_ids=torch.tensor([tokens_of(tokenizer, batch, row)])).last_hidden_state[0]
        expected = states @ map.weight.T + map.bias
        assert torch.allclose(found.embeddings[row][found.mask[row]], expected, atol=1e-5, rtol=1e-5)
    found.embeddings.sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in encoder.parameters())
    with pytest.raises(ConfigurationError, match="must share a tokenizer"):
        Transformer(pretrained=str(tmp_path / "encoder")).build(nn.Embedding(7, 16))
    with pytest.raises(ConfigurationError, match="Cannot load `no/such` as an encoder"):
        Transformer(pretrained="no/such").build(backbone.embedding)
    width = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    few = BertConfig(vocab_size=size, max_position_embeddings=4, **width)
    BertModel(few).save_pretrained(tmp_path / "few")
    embedder = EmbedderIC(Linear(length=2, encoding=Transformer(pretrained=str(tmp_path / "few"))))
    embedder.build(tasks, tokenizer, backbone.embedding)
    with pytest.raises(ConfigurationError, match=r"A text of \d+ tokens is given to the encoder `.*few`, which has 4"):
        embedder(batch, backbone.embedding)


@pytest.mark.parametrize("relaxation", [StraightThrough, GumbelStraightThrough])
def test_slots_choose_different_candidates_unless_they_may_repeat(tokenizer, tasks, backbone, relaxation):
    for repeats in (False, True):
        extractor = ExtractorDP(3, 3, 32, ANNOTATED, relaxation(temperature=0.5), repeats=repeats)
        extractor.build(tasks, tokenizer, backbone.embedding)
        extractor.logits.data[:] = torch.tensor([90.0, 60.0, 30.0])
        weights = extractor.relaxation.weights(extractor.logits, repeats)
        assert weights.argmax(-1).tolist() == [[0, 0, 0] if repeats else [0, 1, 2]] * 3
        assert weights.sum(-1).eq(1).all()
        chosen = [slot.candidate for slot in extractor.describe(tokenizer, backbone.embedding)[0].slots]
        assert chosen == ([0, 0, 0] if repeats else [0, 1, 2])


def test_gumbel_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0])
    drawn = GumbelStraightThrough(temperature=0.3).weights(logits.expand(200_000, 1, 3)).mean(dim=(0, 1))
    expected = logits.softmax(0)
    standard_errors = (drawn - expected).abs() / (expected * (1 - expected) / 200_000).sqrt()
    assert Error(standard_errors.max()) < 5  # which a right one exceeds once in half a million times


def test_an_annealed_temperature_follows_the_steps_and_survives_a_checkpoint():
    relaxation = Soft(temperature=Annealed(start=4.0, end=0.25, steps=4))
    seen = []
    for _ in range(6):
        seen.append(relaxation.temperature)
        relaxation.advance()
    assert seen == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25, 0.25])
    resumed = Soft(temperature=Annealed(start=4.0, end=0.25, steps=4))
    resumed.load_state_dict(relaxation.state_dict())
    assert resumed.temperature == 0.25
    assert torch.equal(Soft(2.0).weights(torch.ones(1, 1, 2)), Soft(Annealed(2.0, 1.0, 9)).weights(torch.ones(1, 1, 2)))


def test_an_expected_loss_over_all_samples_is_exact_and_over_some_compares_them(tokenizer, tasks, backbone):
    batch = batch_of(tokenizer, INPUTS, [1, 0, 1])
    losses = {}
    for samples in (None, 3, 2):
        torch.manual_seed(0)
        extractor = built(ExtractorDP(1, 3, 32, ANNOTATED, ExpectedLoss(samples=samples)), tasks, tokenizer, backbone)
        found = extractor(batch, backbone.embedding)
        assert len(found.embeddings) == 3 * (samples or 3)
        assert found.alternatives.weight.view(3, -1).sum(1).tolist() == pytest.approx([1.0] * 3)
        loss = backbone.loss(batch, found)
        losses[samples] = loss, torch.autograd.grad(loss, extractor.logits)[0]
    assert torch.allclose(losses[3][0], losses[None][0], atol=1e-5)
    assert torch.allclose(losses[3][1], losses[None][1], atol=1e-5)
    assert not torch.allclose(losses[2][1], losses[None][1], atol=1e-5)


def test_an_expected_loss_of_several_slots_weighs_drawn_choices_by_their_joint_probability(tokenizer, tasks, backbone):
    extractor = built(ExtractorDP(2, 3, 32, ANNOTATED, ExpectedLoss(samples=4)), tasks, tokenizer, backbone)
    choice, log_probability = extractor.relaxation.draw(extractor.logits, 4, repeats=False)
    assert (choice[..., 0] != choice[..., 1]).all()
    p = extractor.logits.softmax(-1)
    for task in range(3):
        for i in range(4):
            first, second = choice[task, i].tolist()
            rest = p[task, 1].clone()
            rest[first] = 0
            expected = p[task, 0, first] * rest[second] / rest.sum()
            assert log_probability[task, i].exp().item() == pytest.approx(expected.item(), rel=1e-4)
    found = extractor(batch_of(tokenizer, INPUTS, [1, 0, 2]), backbone.embedding)
    assert found.alternatives.weight.view(3, 4).sum(1).tolist() == pytest.approx([1.0] * 3)


def test_an_instance_is_never_its_own_exemplar(tokenizer, tasks, backbone):
    pool = CandidatePool(positive_examples=False)
    for form in (
        ExtractorDP(1, 4, 32, pool, Soft()),
        ExtractorIC(1, 4, 32, pool, Soft()),
        RandomExemplar(1, 4, 32, pool),
        FixedExemplar(1, 4, 32, pool, index=2),
    ):
        instruction = built(form, tasks, tokenizer, backbone)
        position = instruction.candidate_rows[0][2].instance
        batch = batch_of(tokenizer, INPUTS * 20, [0] * 60)._replace(instance=torch.full((60,), position))
        allowed = instruction.allowed(batch)
        assert (~allowed).nonzero()[:, 1].tolist() == [2] * 60
        own = instruction.choose(torch.zeros(1, dtype=torch.long), torch.tensor([[2]]), backbone.embedding)
        if isinstance(instruction, RandomExemplar):
            drawn = instruction(batch, backbone.embedding).embeddings
            assert not any(torch.equal(row, own.embeddings[0]) for row in drawn)


# Inputs, and what they are once case, white space and the width of characters do not count.
FOLDED = {"sun moon": "sun moon", " Sun  moon ": "sun moon", "\uff53un moon": "sun moon", "sun": "sun", "wolf": "wolf"}


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.lists(st.sampled_from(list(FOLDED)), min_size=2, max_size=8),
    annotated=st.lists(st.sampled_from(list(FOLDED)), max_size=3),
    unseen=st.booleans(),
)
def test_no_instance_may_choose_an_exemplar_with_its_input(inputs, annotated, unseen):
    instances = tuple(Instance(str(index), text, (WORDS[index],)) for index, text in enumerate(inputs))
    examples = tuple(Example(text, "bear") for text in annotated)
    negative = tuple(Example(text, "bear") for text in FOLDED)  # whose outputs are no answers
    task = Task("task001", ("a",), ("d",), examples, negative, instances)
    form = ExtractorIC(1, 32, 16, CandidatePool(negative_examples=True), targets=False)
    form.build(*([], some_tokenizer(), EMBEDDING, [task]) if unseen else ([task], some_tokenizer(), EMBEDDING))
    batch = batch_of(some_tokenizer(), [*inputs, "bear"], [0] * (len(inputs) + 1))
    batch = batch._replace(instance=torch.tensor([*range(len(inputs)), 99]))
    allowed = form.allowed(batch)
    for row, text in enumerate([*map(FOLDED.get, inputs), "none"]):
        found = [c for c, may in zip(form.candidate_rows[0], allowed[row].tolist(), strict=False) if may]
        expected = [c for c in form.candidate_rows[0] if c.kind == "Negative" or FOLDED[c.example.input] != text]
        assert found == expected


def test_a_fixed_exemplar_is_the_same_for_all_instances_of_a_task(tokenizer, tasks, backbone):
    def chosen(instruction: FixedExemplar, order: list[int]) -> list[list[int]]:
        """The candidates of the tasks, which are given in some order."""
        instruction.build([tasks[i] for i in order], tokenizer, backbone.embedding)
        described = instruction.describe(tokenizer, backbone.embedding)
        batch = batch_of(tokenizer, ["wolf"] * 9, [0, 1, 2] * 3)
        found = instruction(batch, backbone.embedding)
        of_tasks = instruction.task_embeddings(backbone.embedding)
        for row, task in enumerate(batch.task.tolist()):
            assert torch.equal(found.embeddings[row][found.mask[row]], of_tasks[task])
        return [[slot.candidate for slot in described[order.index(i)].slots] for i in range(3)]

    for seed in range(3):
        drawn = chosen(FixedExemplar(2, 6, 32, seed=seed), [0, 1, 2])
        assert drawn == chosen(FixedExemplar(2, 6, 32, seed=seed), [2, 0, 1])
        assert all(len(set(row)) == 2 for row in drawn)
    assert len({str(chosen(FixedExemplar(1, 6, 32, seed=seed), [0, 1, 2])) for seed in range(9)}) > 3
    assert chosen(FixedExemplar(1, 3, 32, ANNOTATED, index=1), [0, 1, 2]) == [[1]] * 3
    assert chosen(FixedExemplar(2, 3, 32, ANNOTATED, index=2), [0, 1, 2]) == [[2, 0]] * 3
    with pytest.raises(ConfigurationError, match=r"`index` .* is 3, and the task `task001` has 3 candidates"):
        chosen(FixedExemplar(1, 9, 32, ANNOTATED, index=3), [0, 1, 2])


def test_each_instance_may_choose_among_candidates_of_its_own(tokenizer, tasks, backbone):
    extractor = built(
        ExtractorDP(1, 3, 32, ANNOTATED, StraightThrough(), candidates_per_instance=2), tasks, tokenizer, backbone
    )
    batch = batch_of(tokenizer, INPUTS * 40, [0] * 120)
    allowed = extractor.allowed(batch)
    assert allowed.sum(1).tolist() == [2] * 120
    assert allowed.float().mean(0).tolist() == pytest.approx([2 / 3] * 3, abs=0.15)


def test_looking_at_what_was_learned_draws_nothing(tokenizer, tasks, backbone):
    extractor = built(ExtractorIC(1, 3, 32, ANNOTATED, candidates_per_instance=2), tasks, tokenizer, backbone)
    before = torch.get_rng_state()
    extractor.describe(tokenizer, backbone.embedding)
    extractor.representatives(backbone.embedding)
    assert torch.equal(before, torch.get_rng_state())


SOURCES = ("positive_examples", "negative_examples", "definitions", "instances")
POOLS = [dict(zip(SOURCES, given, strict=True)) for given in itertools.product([True, False], repeat=4) if any(given)]


@pytest.mark.parametrize("sources", POOLS, ids=lambda sources: "+".join(name for name in sources if sources[name]))
def test_every_mixture_of_candidates_is_read_as_prompts_have_it(tokenizer, tasks, backbone, sources):
    pool = CandidatePool(**sources)
    extractor = built(ExtractorDP(1, 12, 32, pool), tasks, tokenizer, backbone)
    kinds = ["Positive"] * 3, ["Negative"], ["Definition"] * 2, ["Positive"] * 4
    expected = [kind for name, of_source in zip(SOURCES, kinds, strict=True) for kind in of_source if sources[name]]
    assert [candidate.kind for candidate in extractor.candidate_rows[0]] == expected
    task = torch.zeros(1, dtype=torch.long)
    for index, (kind, text) in enumerate(zip(expected, extractor.candidate_texts[0], strict=True)):
        header = "" if kind == "Definition" else f" {kind} Example 1 -\n"
        ids, choice = tokenizer(header + text, add_special_tokens=False)["input_ids"], torch.tensor([[index]])
        for found in (
            extractor.choose(task, choice, backbone.embedding),
            extractor.mix(task, nn.functional.one_hot(choice, 12).float(), backbone.embedding),
        ):
            assert torch.allclose(found.embeddings[0][found.mask[0]], backbone.embedding.weight[ids], atol=1e-6)
    batch = batch_of(tokenizer, INPUTS, [0, 1, 2])
    forms = [ExtractorDP(2, 12, 32, pool, repeats=True), ExtractorDP(1, 12, 32, pool, Soft())]
    forms += [ExtractorIC(1, 12, 32, pool, ExpectedLoss()), RandomExemplar(1, 12, 32, pool)]
    for form in forms:
        instruction = built(form, tasks, tokenizer, backbone)
        loss = backbone.loss(batch, instruction(batch, backbone.embed))
        parameters = list(instruction.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else []
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_long_candidates_are_refused_where_they_must_not_be_cut(tokenizer, tasks, backbone):
    extractor = ExtractorDP(1, 3, candidate_length=5, pool=ANNOTATED, cut_candidates=False)
    with pytest.raises(
        ConfigurationError, match=r"9 candidates are longer than `candidate_length`, 5 tokens.*'Input: "
    ):
        extractor.build(tasks, tokenizer, backbone.embedding)


def test_task_weights_multiply_the_losses_of_their_instances(tokenizer, tasks, backbone):
    weights = built(TaskWeights(), tasks, tokenizer, backbone)
    batch = batch_of(tokenizer, INPUTS, [1, 0, 1])
    expected, tokens = torch.zeros(()), (batch.labels != -100).sum()
    for row, task in enumerate([1, 0, 1]):
        one = Batch(*(column[row : row + 1] for column in batch))
        share = (one.labels != -100).sum() / tokens
        expected = expected + 3 * weights.logits.softmax(0)[task] * share * backbone.loss(one)
    assert torch.allclose(backbone.loss(batch, weights(batch, backbone.embedding)), expected, atol=1e-5)
    assert sum(row.weight for row in weights.describe(tokenizer, backbone.embedding)) == pytest.approx(3, abs=1e-3)


def test_a_composition_is_its_parts_in_a_row(tokenizer, tasks, backbone):
    soft, chosen = EmbedderDP(2), ExtractorDP(1, 3, 32, ANNOTATED, ExpectedLoss())
    both = built(Composition([soft, chosen, TaskWeights()]), tasks, tokenizer, backbone)
    batch = batch_of(tokenizer, INPUTS, [1, 0, 1])
    found, alone = both(batch, backbone.embedding), chosen(batch, backbone.embedding)
    assert torch.equal(found.embeddings[:, 2:], alone.embeddings)
    assert torch.equal(found.embeddings[:, :2], soft.weight[batch.task[alone.alternatives.instance]])
    assert found.weight.shape == (3,)
    described = both.describe(tokenizer, backbone.embedding)[1]
    assert described.task == "task002"
    assert [part.form for part in described.parts] == ["EmbedderDP", "ExtractorDP", "TaskWeights"]
    (embeddings, *_) = both.task_embeddings(backbone.embedding)
    assert torch.equal(embeddings[:2], soft.weight[0])
    with pytest.raises(ConfigurationError, match="2 parts of a Composition sum over alternatives"):
        built(Composition([chosen, chosen]), tasks, tokenizer, backbone)(batch, backbone.embedding)
    with pytest.raises(ConfigurationError, match="`parts` of a Composition is empty"):
        Composition([])


def test_initial_values_of_every_kind(tokenizer, tasks, backbone):
    values = Exemplar()(tasks, 40, tokenizer, backbone.embedding)
    text = f" Positive Example 1 -\nInput: {WORDS[0]}.\n Output: {WORDS[0]}.\n\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.equal(values[0, : len(ids)], backbone.embedding.weight[ids])
    for number, there in ((2, 2), (9, 3)):  # the task has three
        text = "".join(
            f" Positive Example {n + 1} -\nInput: {' '.join(WORDS[: n + 1])}.\n Output: {WORDS[n]}.\n\n"
            for n in range(there)
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        values = Exemplar(number)(tasks, len(ids) + 1, tokenizer, backbone.embedding)
        assert torch.equal(values[0], backbone.embedding.weight[[*ids, ids[0]]])
    drawn = Vocabulary(first=7)(tasks, 300, tokenizer, backbone.embedding).flatten(0, 1)
    among = [(drawn == row).all(dim=1).any().item() for row in backbone.embedding.weight]
    assert among == [i < 7 and i not in tokenizer.all_special_ids for i in range(len(among))]
    with pytest.raises(ConfigurationError, match=r"The first 1 tokens of the vocabulary \(`first`\) are special ones"):
        Vocabulary(first=1)(tasks, 4, tokenizer, backbone.embedding)
    for init in (None, Vocabulary()):
        shared = SharedInCategory(init)(tasks, 4, tokenizer, backbone.embedding)
        assert torch.equal(shared[0], shared[2])  # both of category a
        assert not torch.equal(shared[0], shared[1])
    assert SharedInCategory(Normal())(tasks, 4, tokenizer, backbone.embedding).shape == (3, 4, 16)


@pytest.mark.parametrize("make", [lambda: EmbedderDP(2), lambda: ExtractorDP(1, 3, 32, ANNOTATED), TaskWeights])
def test_forms_with_rows_refuse_a_task_without_one(make, tokenizer, tasks, backbone):
    instruction = built(make(), tasks, tokenizer, backbone)
    with pytest.raises(ConfigurationError, match="for each of its 3 train tasks and none for the task with index 3"):
        instruction(batch_of(tokenizer, INPUTS, [0, 3, 1]), backbone.embedding)
    assert not instruction.works_on_unseen_tasks


def test_forms_by_conversion_work_on_unseen_tasks_without_their_answers(tokenizer, tasks, backbone):
    seen, unseen = tasks[:2], tasks[2:]
    for form in (EmbedderIC(Linear(2), targets=False), ExtractorIC(1, 5, 32, targets=False)):
        form.build(seen, tokenizer, backbone.embedding, unseen)
        assert form.works_on_unseen_tasks
        batch = batch_of(tokenizer, INPUTS, [2, 2, 2])
        found = form(batch, backbone.embedding)
        changed = form(batch._replace(labels=batch.labels + 1), backbone.embedding)
        assert torch.equal(found.embeddings, changed.embeddings)
    assert all(candidate.instance < 0 for candidate in form.candidate_rows[2])
    assert not EmbedderIC().works_on_unseen_tasks
    with pytest.raises(ConfigurationError, match=r"`task003` has 0 candidate exemplars .* only annotated ones count"):
        ExtractorIC(1, 4, 32, CandidatePool(positive_examples=False)).build(seen, tokenizer, backbone.embedding, unseen)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Annealed(1.0, 0.0, 5), "must be positive, got 1.0, 0.0 and 5"),
        (lambda: ExpectedLoss(samples=1), "`samples` of ExpectedLoss must be 2 or more"),
        (lambda: Pooled(hidden=0), "`hidden` must be 1 or more"),
        (lambda: Transformer(layers=0), "`layers` and `heads` must be 1 or more, got 0 and 4"),
        (lambda: Transformer(heads=3).build(nn.Embedding(5, 16)), "`heads` is 3, which does not divide .* 16"),
        (lambda: Vocabulary(first=0), "`first` of an initialization from the vocabulary must be 1 or more, got 0"),
        (lambda: Exemplar(0), "`number` of an initialization by exemplars must be 1 or more, got 0"),
        (lambda: FixedExemplar(index=-1), "`index` of a fixed exemplar must be 0 or more, got -1"),
        (lambda: Linear(length=0), "`length` of a soft instruction must be 1 or more"),
        (lambda: TokenWise(max_length=0), "`max_length` of a token-wise conversion"),
        (lambda: ExtractorIC(slots=3, candidates=9, candidates_per_instance=2), r"chooses 3 exemplars .* among 2"),
        (lambda: ExtractorDP(repeats=True, candidates_per_instance=0), "`candidates_per_instance` must be 1 or more"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_unit_scale_is_the_root_mean_square():
    assert torch.allclose(unit_scale(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 4.0]]) / 12.5**0.5)


def test_forms_by_conversion_are_described_by_the_first_instances_of_each_task(tokenizer, tasks, backbone):
    embedder = built(EmbedderIC(TokenWise(max_length=8)), tasks, tokenizer, backbone)
    extractor = built(ExtractorIC(2, 3, 32, ANNOTATED), tasks, tokenizer, backbone)
    for form in (embedder, extractor):
        assert form.task_embeddings(backbone.embedding) is None  # there is none for a task
        assert len(form.representatives(backbone.embedding)) == 3
    (first, *_) = embedder.representatives(backbone.embedding)
    text = f"Now complete the following example -\nInput: {tasks[0].instances[0].input}.\nOutput: "
    ids = tokenizer(text)["input_ids"] + tokenizer(tasks[0].instances[0].outputs[0])["input_ids"]
    expected = embedder.conversion.map(unit_scale(backbone.embedding.weight[ids[:8]]))
    assert torch.allclose(first, expected, atol=1e-5)
    said = embedder.describe(tokenizer, backbone.embedding)[0]
    assert len(said.nearest_tokens) == len(said.cosine) == 8
    choices = [slot.candidate for slot in extractor.describe(tokenizer, backbone.embedding)[1].slots]
    assert len(set(choices)) == 2
    both = built(Composition([EmbedderDP(2), extractor]), tasks, tokenizer, backbone)
    assert both.task_embeddings(backbone.embedding) is None
    assert len(both.representatives(backbone.embedding)[0]) > 2
