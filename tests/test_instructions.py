"""Learnable instructions and how they meet the backbone."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from diopt_lightning import ConfigurationError, InstructionOptimization, InstructionTuning
from diopt_lightning.backbones import RandomSeq2Seq, Seq2Seq
from diopt_lightning.bilevel import BilevelProblem, Neumann
from diopt_lightning.callbacks import RandomState, UniformNoise
from diopt_lightning.data.collate import Batch
from diopt_lightning.data.prompts import PromptFormat, render
from diopt_lightning.data.synthetic import WORDS, word_tokenizer
from diopt_lightning.data.tasks import Example, Instance, Task
from diopt_lightning.instructions import (
    CandidatePool,
    Definition,
    Description,
    EmbedderDP,
    ExpectedLoss,
    ExtractorDP,
    InstructionEmbeddings,
    Normal,
    RandomExemplar,
    Soft,
    StraightThrough,
    Vocabulary,
)
from tests.conftest import TINY_T5
from tests.forms import INPUTS, batch_of
from tests.helpers import prepend, quiet_trainer
from tests.runs import data


@pytest.fixture
def tokenizer():
    return word_tokenizer([*WORDS, "definition"])


@pytest.fixture
def tasks():
    """Two tasks with positive examples of unequal lengths and a few instances."""

    def task(name: str, words: list[str]) -> Task:
        examples = tuple(Example(" ".join(words[: n + 1]), words[n]) for n in range(3))
        instances = tuple(Instance(f"{name}-{n}", words[n + 3], (words[n + 2],)) for n in range(4))
        return Task(name, ("c",), (" ".join(words[:4]),), examples, (), instances)

    return [task("task001", WORDS[:10]), task("task002", WORDS[20:30])]


@pytest.fixture
def backbone(tokenizer):
    backbone = RandomSeq2Seq(dict(TINY_T5))
    backbone.build(tokenizer)
    return backbone


def test_a_chosen_exemplar_is_to_the_model_what_its_text_is(tokenizer, tasks, backbone):
    extractor = ExtractorDP(slots=2, candidates=3, candidate_length=32, relaxation=StraightThrough())
    extractor.build(tasks, tokenizer, backbone.embedding)
    with torch.no_grad():  # task 0 chooses exemplars 2 and 0, task 1 exemplars 1 and 2
        for task, choices in enumerate([(2, 0), (1, 2)]):
            for slot, choice in enumerate(choices):
                extractor.logits[task, slot, choice] = 5.0
    learned = batch_of(tokenizer, INPUTS, [0, 1, 0])

    def written(task: Task, choices: tuple[int, int], text: str) -> str:
        chosen = Task(task.name, ("c",), ("d",), tuple(task.positive_examples[c] for c in choices), (), task.instances)
        prompt = render(chosen, "x", PromptFormat(definition=False, positive_examples=2), fits=lambda text: True)
        return prompt.text.split("Now complete")[0] + text

    texts = [written(tasks[t], [(2, 0), (1, 2)][t], text) for t, text in zip([0, 1, 0], INPUTS, strict=True)]
    plain = batch_of(tokenizer, texts, [0, 1, 0])
    with torch.no_grad():
        assert torch.allclose(
            backbone.loss(learned, extractor(learned, backbone.embedding)), backbone.loss(plain), atol=1e-6
        )


def test_a_mixture_equals_the_obvious_loop(tokenizer, tasks, backbone):
    extractor = ExtractorDP(slots=2, candidates=4, candidate_length=32, relaxation=Soft(temperature=0.7))
    extractor.build(tasks, tokenizer, backbone.embedding)
    nn.init.normal_(extractor.logits)
    batch = batch_of(tokenizer, INPUTS, [1, 0, 1])
    embeddings, mask = extractor(batch, backbone.embedding)[:2]
    weight = backbone.embedding.weight
    for row, task in enumerate([1, 0, 1]):
        expected, used = [], []
        for slot in range(2):
            header = tokenizer(f" Positive Example {slot + 1} -\n", add_special_tokens=False)["input_ids"]
            expected += [weight[index] for index in header]
            used += [True] * len(header)
            p = (extractor.logits[task, slot] / 0.7).softmax(0)
            bodies = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in extractor.candidate_texts[task]]
            for position in range(extractor.candidate_ids.shape[-1]):
                mixed = torch.zeros(16)
                for j, body in enumerate(bodies):
                    if position < len(body):
                        mixed = mixed + p[j] * weight[body[position]]
                expected.append(mixed)
                used.append(any(position < len(body) for body in bodies))
        assert torch.allclose(embeddings[row], torch.stack(expected), atol=1e-6)
        assert mask[row].tolist() == used


def test_straight_through_is_one_hot_forward_and_softmax_backward():
    logits = torch.tensor([[[0.3, -1.0, 0.9]], [[2.0, 0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    hard, soft = StraightThrough(temperature=0.5).weights(logits), Soft(temperature=0.5).weights(logits)
    assert hard.tolist() == [[[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]]
    assert torch.equal(*(torch.autograd.grad((w * values).sum(), logits)[0] for w in (hard, soft)))


def test_the_expected_loss_equals_the_obvious_loop(tokenizer, tasks, backbone):
    extractor = ExtractorDP(candidates=3, candidate_length=32, relaxation=ExpectedLoss(temperature=2.0))
    extractor.build(tasks, tokenizer, backbone.embedding)
    nn.init.normal_(extractor.logits)
    batch = batch_of(tokenizer, INPUTS, [1, 0, 1])
    batch.labels[0, -1] = -100  # unequal numbers of target tokens
    p = (extractor.logits[:, 0] / 2.0).softmax(-1)
    expected = torch.zeros(())
    for row in range(3):
        one = Batch(*(column[row : row + 1] for column in batch))
        tokens = (one.labels != -100).sum()
        for j in range(3):
            chosen = extractor.choose(one.task, torch.tensor([[j]]), backbone.embedding)
            expected = expected + p[one.task.item(), j] * tokens * backbone.loss(one, chosen)
    expected = expected / (batch.labels != -100).sum()
    found = backbone.loss(batch, extractor(batch, backbone.embedding))
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad(loss, extractor.logits, retain_graph=True)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_expected_loss_draws_one_candidate_where_nothing_is_differentiated(tokenizer, tasks, backbone):
    extractor = ExtractorDP(candidates=3, candidate_length=32, relaxation=ExpectedLoss())
    extractor.build(tasks, tokenizer, backbone.embedding)
    extractor.logits.data[0, 0] = torch.tensor([0.0, 1.0, -1e9])
    extractor.logits.requires_grad_(False)
    batch = batch_of(tokenizer, ["wolf"] * 300, [0] * 300)
    drawn = extractor(batch, backbone.embedding)
    assert drawn.alternatives is None
    choices = [extractor.choose(torch.tensor([0]), torch.tensor([[j]]), backbone.embedding)[0][0] for j in range(3)]
    counts = [sum(torch.equal(row, choice) for row in drawn.embeddings) for choice in choices]
    assert counts[2] == 0
    assert counts[1] / 300 == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.1)


def test_the_expected_loss_is_refused_for_several_slots(tokenizer, tasks, backbone):
    extractor = ExtractorDP(slots=2, candidates=3, relaxation=ExpectedLoss())
    extractor.build(tasks, tokenizer, backbone.embedding)
    with pytest.raises(ConfigurationError, match="ExpectedLoss sums over all candidates of one slot, and `slots` is 2"):
        extractor(batch_of(tokenizer, INPUTS, [0, 1, 0]), backbone.embedding)


def test_the_gradient_of_an_instruction_is_right_in_float64(tokenizer, tasks, monkeypatch):
    # T5's layer norm computes in float32 even in a float64 model, which no gradient check survives.
    from transformers.models.t5 import modeling_t5

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", forward)
    backbone = RandomSeq2Seq(dict(TINY_T5) | {"feed_forward_proj": "gated-gelu"})
    backbone.build(tokenizer)
    backbone.double()
    batch = batch_of(tokenizer, INPUTS[:2], [0, 1])
    for instruction in (
        EmbedderDP(length=2),
        *(ExtractorDP(slots=1, candidates=3, relaxation=r) for r in (Soft(), ExpectedLoss())),
    ):
        instruction.build(tasks, tokenizer, backbone.embedding)
        instruction.double()
        name, parameter = next(instruction.named_parameters())

        def loss(value, instruction=instruction, name=name):
            embeddings = torch.func.functional_call(instruction, {name: value}, (batch, backbone.embedding))
            return backbone.loss(batch, embeddings)

        assert torch.autograd.gradcheck(loss, (parameter.detach().clone().requires_grad_(),))


def test_prepending_leaves_no_gaps():
    instruction = InstructionEmbeddings(
        torch.arange(8.0).reshape(2, 4, 1), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    )
    source = 10 + torch.arange(6.0).reshape(2, 3, 1)
    embeddings, mask = prepend(instruction, source, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert embeddings.squeeze(-1).tolist() == [[0, 2, 10, 11], [7, 13, 14, 15]]


def test_initial_values_come_from_where_they_should(tokenizer, tasks, backbone):
    words = backbone.embedding.weight.detach()
    made = {}
    for init in (Normal(), Normal(std=3.0), Vocabulary(), Definition()):
        embedder = EmbedderDP(length=6, init=init)
        embedder.build(tasks, tokenizer, backbone.embedding)
        made[init] = embedder.weight.detach()
        assert embedder.weight.shape == (2, 6, 16)
    matched, wide, vocabulary, definition = made.values()
    assert matched.std() / words.std() == pytest.approx(1.0, abs=0.2)
    assert wide.std() == pytest.approx(3.0, rel=0.2)
    ordinary = words[3:]
    assert all((row == ordinary).all(-1).any() for row in vocabulary.flatten(0, 1))
    ids = tokenizer(" ".join(WORDS[20:24]), add_special_tokens=False)["input_ids"]
    assert torch.equal(definition[1], words[[*ids, *ids[:2]]])  # repeated to the length


def test_what_was_learned_can_be_read(tokenizer, tasks, backbone):
    embedder = EmbedderDP(length=2, init=Definition())
    embedder.build(tasks, tokenizer, backbone.embedding)
    described = embedder.describe(tokenizer, backbone.embedding)[0]
    assert described == Description("task001", nearest_tokens=WORDS[:2], cosine=[1.0, 1.0])
    extractor = ExtractorDP(candidates=3, candidate_length=32)
    extractor.build(tasks, tokenizer, backbone.embedding)
    extractor.logits.data[1, 0, 2] = 1.0
    slot = extractor.describe(tokenizer, backbone.embedding)[1].slots[0]
    assert slot.candidate == 2
    assert slot.probability == pytest.approx(torch.tensor([0.0, 0.0, 1.0]).softmax(0)[2].item(), abs=1e-4)
    assert slot.exemplar == f"Input: {' '.join(WORDS[20:23])}.\n Output: {WORDS[22]}."


def test_candidates_are_positive_examples_then_instances(tasks):
    candidates = CandidatePool().candidates(tasks[0], 6)
    texts = [candidate.text(explanations=False) for candidate in candidates]
    assert [text.startswith("Input: apple") for text in texts] == [True] * 3 + [False] * 3
    assert [candidate.instance >= 0 for candidate in candidates] == [False] * 3 + [True] * 3
    assert len(set(texts)) == 6
    assert candidates == CandidatePool().candidates(tasks[0], 6)
    pools = [CandidatePool(positive_examples=False, seed=seed).candidates(tasks[0], 4) for seed in (0, 1)]
    assert pools[0] != pools[1]
    assert len(CandidatePool().candidates(tasks[0], 6, unseen=True)) == 3  # an unseen task's instances have answers


def test_random_exemplars_are_drawn_anew_and_without_repetition(tokenizer, tasks, backbone):
    random = RandomExemplar(slots=2, candidates=3, candidate_length=32)
    random.build(tasks, tokenizer, backbone.embedding)
    assert not list(random.parameters())
    batch = batch_of(tokenizer, ["wolf"] * 64, [0] * 64)
    embeddings = random(batch, backbone.embedding).embeddings
    first, second = embeddings.chunk(2, dim=1)
    header = random.header_ids.shape[-1]
    assert len({tuple(row.flatten().tolist()) for row in first[:, header:]}) == 3
    assert not any(torch.equal(a[header:], b[header:]) for a, b in zip(first, second, strict=True))


def test_cut_candidates_are_counted(tokenizer, tasks, backbone, caplog):
    extractor = ExtractorDP(candidates=3, candidate_length=5)
    with caplog.at_level("INFO"):
        extractor.build(tasks, tokenizer, backbone.embedding)
    assert "candidates: 6 of 6 cut to 5 tokens" in caplog.text


def test_noise_on_phi_is_uniform_and_the_same_in_a_run_that_goes_on(blank_exemplars, tmp_path):
    def fit(name: str, steps: int, *callbacks: UniformNoise, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        module = InstructionOptimization(
            RandomSeq2Seq(dict(TINY_T5)),
            EmbedderDP(length=3),
            Neumann(terms=1, step_size=1e-3),
            outer_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        )
        saving = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=3, save_top_k=-1)
        every = [saving, RandomState(), *callbacks]
        trainer = quiet_trainer(max_steps=steps, limit_val_batches=0, enable_checkpointing=True, callbacks=every)
        trainer.fit(module, data(blank_exemplars, tmp_path / "data"), **options)
        return module.instruction.weight.detach()

    still, once, whole = fit("still", 1), fit("once", 1, UniformNoise(0.5)), fit("whole", 6, UniformNoise(0.5))
    noise = once - still
    assert noise.abs().max() <= 0.5
    assert noise.std() == pytest.approx(0.5 / 3**0.5, rel=0.1)  # of 192 entries
    assert (whole - still).std() == pytest.approx((6 / 3) ** 0.5 * 0.5, rel=0.2)  # which add up
    path = tmp_path / "whole" / "step=3.ckpt"
    assert torch.equal(fit("resumed", 6, UniformNoise(0.5), ckpt_path=path), whole)
    with pytest.raises(ConfigurationError, match="InstructionTuning has none: remove the callback"):
        UniformNoise(0.5).on_train_batch_start(
            quiet_trainer(), InstructionTuning(RandomSeq2Seq(dict(TINY_T5))), None, 0
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformNoise(0.0), "`size` of uniform noise must be positive, got 0"),
        (lambda: EmbedderDP(length=0), "`length` of a soft instruction must be 1 or more, got 0"),
        (lambda: Normal(std=0.0), "`std` of a normal initialization must be positive, got 0"),
        (lambda: Soft(temperature=0.0), "`temperature` must be positive, got 0"),
        (lambda: ExtractorDP(slots=0), "`slots` of an extractor must be 1 or more, got 0"),
        (lambda: ExtractorDP(slots=3, candidates=2), r"chooses 3 exemplars \(`slots`\) among 2"),
        (lambda: CandidatePool(positive_examples=False, instances=False), "and has none of them"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_too_few_candidates_name_the_task(tokenizer, tasks, backbone):
    pool = CandidatePool(instances=False)
    with pytest.raises(ConfigurationError, match="`task001` has 3 candidate exemplars for 4 `slots`"):
        ExtractorDP(slots=4, candidates=8, pool=pool).build(tasks, tokenizer, backbone.embedding)
    with pytest.raises(ConfigurationError, match="one of which may be the instance itself"):
        ExtractorDP(slots=7, candidates=8).build(tasks, tokenizer, backbone.embedding)


class TestSeq2Seq:
    """The encoder-decoder backbone."""

    def test_a_local_folder_is_loaded_for_training(self, backbone, tokenizer, tmp_path):
        backbone.model.save_pretrained(tmp_path / "model")
        loaded = Seq2Seq(pretrained=str(tmp_path / "model"))
        loaded.build(tokenizer)
        assert loaded.model.training
        batch = batch_of(tokenizer, INPUTS, [0, 0, 0])
        assert torch.equal(loaded.loss(batch), backbone.loss(batch))

    def test_the_loss_is_the_mean_over_target_tokens(self, backbone, tokenizer):
        batch = batch_of(tokenizer, INPUTS, [0, 0, 0])
        batch.labels[0, -1] = -100
        logits = backbone.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).logits
        kept = batch.labels != -100
        expected = nn.functional.cross_entropy(logits[kept], batch.labels[kept])
        assert torch.allclose(backbone.loss(batch), expected)

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "bart", "encoder_attention_heads": 2, "decoder_attention_heads": 2}
            | {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True, "dropout": 0.0},
            dict(TINY_T5) | {"model_type": "umt5"},
        ],
        ids=lambda config: config["model_type"],
    )
    def test_other_families_see_embeddings_as_they_see_tokens(self, tokenizer, config):
        backbone = RandomSeq2Seq(config)
        backbone.build(tokenizer)
        batch = batch_of(tokenizer, INPUTS, [0, 0, 0])
        tokens = backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        assert torch.allclose(backbone.loss(batch), tokens.loss, atol=1e-6)
        assert backbone.generate(batch, max_new_tokens=3).shape[0] == 3

    def test_fused_attention_is_switched_off_for_second_derivatives_alone(self, backbone, tokenizer):
        batch = batch_of(tokenizer, INPUTS, [0, 0, 0])
        gradient = torch.autograd.grad(backbone.loss(batch), backbone.embedding.weight, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product_.* is not implemented"):
            gradient.sum().backward()
        weight = torch.ones((), requires_grad=True)
        problem = BilevelProblem(
            lambda: weight * backbone.loss(batch), lambda: backbone.loss(batch), list(backbone.parameters()), [weight]
        )
        assert Neumann(terms=1, step_size=1e-3)(problem).gradient[0].isfinite()

    def test_build_is_done_once(self, backbone, tokenizer):
        before = copy.deepcopy(backbone.state_dict())
        backbone.build(tokenizer)
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: RandomSeq2Seq({"d_model": 8}), "needs a `model_type`"),
            (lambda: RandomSeq2Seq({"model_type": "no_such_model"}), "makes no encoder-decoder model"),
            (lambda: RandomSeq2Seq({"model_type": "llama"}), "makes no encoder-decoder model"),
            (lambda: RandomSeq2Seq(dict(TINY_T5) | {"vocab_size": 10}), r"tokens, and the model .* 10 embeddings"),
            (
                lambda: RandomSeq2Seq(dict(TINY_T5) | {"pad_token_id": 5}),
                "The pad token is 0 in the tokenizer and 5 in",
            ),
            (lambda: Seq2Seq("no/model/here"), "Cannot load `no/model/here`"),
        ],
    )
    def test_bad_options_are_named(self, tokenizer, make, message):
        with pytest.raises(ConfigurationError, match=message):
            make().build(tokenizer)


def test_an_exemplar_of_a_stranger_ends_nothing(tokenizer, tasks, backbone):
    end = tokenizer.eos_token_id
    hostile = [dataclasses.replace(task, positive_examples=(Example("sun </s> sun", "</s>"),)) for task in tasks]
    extractor = ExtractorDP(1, 1, 32, CandidatePool(instances=False))
    extractor.build(hostile, tokenizer, backbone.embedding)
    assert not (extractor.candidate_ids == end).any()
    hostile = [dataclasses.replace(task, definitions=("name </s> sun",)) for task in tasks]
    values = Definition()(hostile, 8, tokenizer, backbone.embedding)
    assert not (values == backbone.embedding.weight[end]).all(dim=-1).any()
