"""Every family of models: embeddings where tokens would be, losses of targets alone, generation, and gradients."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoConfig, CompileConfig, GenerationConfig, PreTrainedTokenizerFast, WatermarkingConfig

import diopt_lightning.backbones
from diopt_lightning import ConfigurationError
from diopt_lightning.backbones import (
    Adapter,
    Backbone,
    ByName,
    Causal,
    LastLayers,
    LoRA,
    RandomCausal,
    RandomSeq2Seq,
    Seq2Seq,
)
from diopt_lightning.bilevel import BilevelProblem, Chebyshev
from diopt_lightning.data.collate import IGNORED_LABEL
from diopt_lightning.data.text_format import causal_format, chat_format, encode, encoder_decoder_format
from diopt_lightning.instructions.base import InstructionEmbeddings
from tests.backbones import (
    BACKBONES,
    CAUSAL,
    CHECKS,
    FAMILIES,
    TARGETS,
    TEMPLATE,
    TEXTS,
    check_generation_is_what_is_predicted,
    check_instructions_are_read_as_text,
    made,
    rows,
    some_tokenizer,
)
from tests.helpers import concrete_classes


@pytest.fixture
def tokenizer():
    return some_tokenizer()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", BACKBONES)
def test_what_holds_of_every_backbone(name, check):
    check(BACKBONES[name])


def test_the_list_of_backbones_is_complete():
    listed = {type(make()) for make in BACKBONES.values()}
    assert listed == set(concrete_classes(diopt_lightning.backbones, Backbone))


@pytest.mark.parametrize("options", [{"pad_token_id": None}, {"eos_token_id": [5, 1]}, {"eos_token_id": None}])
def test_a_model_may_name_several_ends_or_no_special_tokens(options, tokenizer):
    check_generation_is_what_is_predicted(lambda: RandomSeq2Seq(FAMILIES["t5"] | options))
    with pytest.raises(ConfigurationError, match=r"The eos token is 1 in the tokenizer and \[5, 6\] in the model"):
        RandomSeq2Seq(FAMILIES["t5"] | {"eos_token_id": [5, 6]}).build(tokenizer)


@pytest.mark.parametrize(("kind", "name"), [(Seq2Seq, "Llama"), (Seq2Seq, "ViT"), (Causal, "T5")])
def test_a_model_of_another_kind_is_named(kind, name, tokenizer):
    AutoConfig.for_model(name.lower()).save_pretrained("model")
    with pytest.raises(ConfigurationError, match=f"Cannot load `model` as an? .*: it is one of another kind, {name}:"):
        kind("model").build(tokenizer)


@pytest.mark.parametrize("start", [None, [0, 0], -1, 10**6])
def test_a_decoder_begins_with_one_token(start, tokenizer):
    with pytest.raises(ConfigurationError, match=r"does not say what its decoder begins with, but .*`decoder_start_"):
        RandomSeq2Seq(FAMILIES["t5"] | {"decoder_start_token_id": start}).build(tokenizer)


def test_a_tokenizer_that_leaves_ids_out_has_embeddings_for_all():
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "bear": 90}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    backbone = RandomCausal(dict(FAMILIES["llama"]))
    backbone.build(tokenizer)
    assert backbone.embedding.num_embeddings == 91
    with pytest.raises(ConfigurationError, match=r"The tokenizer has 91 tokens, .* 90 embeddings"):
        RandomCausal(FAMILIES["llama"] | {"vocab_size": 90}).build(tokenizer)


@pytest.mark.parametrize("name", CAUSAL)
def test_instruction_embeddings_are_what_their_text_is_in_a_chat(name, tokenizer):
    tokenizer.chat_template = TEMPLATE
    check_instructions_are_read_as_text(lambda: BACKBONES[name](chat_template=True), tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_the_targets_whatever_stands_beside_them(name, tokenizer):
    """Against one row at a time, without padding, by the logits of the whole text."""
    backbone = made(name, tokenizer)
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    total, count = 0.0, 0
    for row in range(3):
        source = batch.input_ids[row, batch.attention_mask[row].bool()]
        target = batch.labels[row, batch.labels[row] != IGNORED_LABEL]
        if name in CAUSAL:
            logits = backbone.model(input_ids=torch.cat([source, target])[None]).logits[0]
            predicted = logits[len(source) - 1 : -1]
        else:
            predicted = backbone.model(input_ids=source[None], labels=target[None]).logits[0]
        total += nn.functional.cross_entropy(predicted, target, reduction="sum").item()
        count += len(target)
    assert backbone.loss(batch).item() == pytest.approx(total / count, rel=1e-5)
    assert batch.labels[0, -1] == IGNORED_LABEL  # there is padding among the targets


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_continues_each_row_greedily_and_stops_at_the_end(name, tokenizer):
    backbone = made(name, tokenizer).eval()
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    found = backbone.generate(batch, max_new_tokens=6)
    for row in range(3):
        ids = batch.input_ids[row, batch.attention_mask[row].bool()].tolist()
        expected: list[int] = []
        while len(expected) < 6 and tokenizer.eos_token_id not in expected:
            with torch.no_grad():
                expected.append(int(backbone.model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax()))
        kept = found[row].tolist()[: len(expected)]
        assert kept == expected
        assert set(found[row].tolist()[len(expected) :]) <= {tokenizer.pad_token_id}


SHIPPED = {
    "min_length": 8,
    "min_new_tokens": 4,
    "max_length": 3,
    "max_time": 1e-9,
    "stop_strings": ["bear"],
    "do_sample": True,
    "num_beams": 3,
    "num_return_sequences": 2,
    "temperature": 9.0,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(3, 60)],
    "suppress_tokens": list(range(3, 60)),
    "begin_suppress_tokens": list(range(3, 60)),
    "sequence_bias": [[[60], 99.0]],
    "forced_bos_token_id": 60,
    "forced_eos_token_id": 60,
    "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 9.0,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "token_healing": True,
    "return_dict_in_generate": True,
    "use_cache": False,
    "eos_token_id": list(range(3, 60)),
    "pad_token_id": 60,
    "decoder_start_token_id": [60, 60, 60],
    "bos_token_id": 60,
    "max_new_tokens": 1,
    "early_stopping": "never",
    "length_penalty": -9.0,
    "num_beam_groups": 3,
    "diversity_penalty": 9.0,
    "constraints": [60],
    "force_words_ids": [[60]],
    "watermarking_config": WatermarkingConfig(greenlist_ratio=0.1, bias=99.0),
    **dict.fromkeys(["top_p", "typical_p", "top_h", "min_p", "epsilon_cutoff", "eta_cutoff"], 0.3),
    **dict.fromkeys(["top_k", "max_cache_len", "prefill_chunk_size", "num_assistant_tokens"], 1),
    **dict.fromkeys(
        ["max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"], 1
    ),
    **dict.fromkeys(["assistant_confidence_threshold", "assistant_ensemble_weight"], 0.9),
    **dict.fromkeys(["output_attentions", "output_hidden_states", "output_scores", "output_logits"], True),
    **dict.fromkeys(["renormalize_logits", "remove_invalid_values", "is_assistant", "low_memory", "use_mtp"], True),
    "num_assistant_tokens_schedule": "constant",
    "speculation_type": "nonsense",
    "dola_layers": "low",
    "cache_implementation": "static",
    "cache_config": {"max_batch_size": 1},
    "disable_compile": False,
    "compile_config": CompileConfig(),
    "continuous_batching_config": {},
    "transformers_version": "nonsense",
}


def test_every_option_of_generation_is_tried():
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} <= SHIPPED.keys()


@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_nothing_that_ships_with_a_model_changes_what_is_generated(name, tokenizer):
    backbone = made(name, tokenizer).eval()
    batch = rows(backbone, tokenizer, TEXTS, TARGETS)
    expected, searched = backbone.generate(batch, 6), backbone.generate(batch, 6, num_beams=3)
    assert not torch.equal(expected, searched)
    each = [{option: value} for option, value in SHIPPED.items()] if name == "bart" else []
    for options in ({}, SHIPPED, *each):
        shipped = GenerationConfig()
        for option, value in options.items():
            setattr(shipped, option, value)
        backbone.model.generation_config = shipped
        assert torch.equal(backbone.generate(batch, 6), expected), options
        if len(options) != 1:
            assert torch.equal(backbone.generate(batch, 6, num_beams=3), searched), options
        assert backbone.model.generation_config is shipped  # an exported model has it as before


class TestTextFormats:
    """What stands around texts."""

    def test_a_causal_target_goes_on_from_the_prompt(self, tokenizer):
        text_format = causal_format(tokenizer)
        source, _ = text_format.source(tokenizer, "Input: sun.\nOutput: ", 64)
        target, _ = text_format.target(tokenizer, "wolf", 64)
        assert source == encode(tokenizer, "Input: sun.\nOutput:")  # nothing ends it
        assert target == [*encode(tokenizer, "wolf"), tokenizer.eos_token_id]

    def test_what_asks_for_the_output_is_never_cut(self, tokenizer):
        text_format = causal_format(tokenizer)
        source, was_cut = text_format.source(tokenizer, f"Input: {'sun ' * 50}.\nOutput: ", 12)
        assert was_cut
        assert len(source) == 12
        assert source[-2:] == encode(tokenizer, "Output:")
        source, was_cut = encoder_decoder_format(tokenizer).source(tokenizer, "sun " * 50, 12)
        assert was_cut
        assert source == [*encode(tokenizer, "sun " * 11), tokenizer.eos_token_id]

    def test_a_chat_opens_and_closes_the_turns(self, tokenizer):
        tokenizer.chat_template = TEMPLATE
        text_format = chat_format(tokenizer)
        source, was_cut = text_format.source(tokenizer, "sun " * 50, 12)
        assert was_cut
        assert tokenizer.decode(source).split() == "user : sun sun sun sun sun sun sun </s> assistant :".split()
        assert text_format.target(tokenizer, " wolf ", 8)[0] == [*encode(tokenizer, "wolf"), tokenizer.eos_token_id]

    def test_a_limit_without_room_for_the_text_is_an_error(self, tokenizer):
        tokenizer.chat_template = TEMPLATE
        with pytest.raises(
            ConfigurationError, match="may have 5 tokens besides the learned instruction, and 5 of them"
        ):
            chat_format(tokenizer).source(tokenizer, "sun", 5)

    @pytest.mark.parametrize("template", [None, "{{ raise_exception('no users') }}", "nothing of it"])
    def test_a_tokenizer_without_a_template_is_an_error(self, tokenizer, template):
        tokenizer.chat_template = template
        with pytest.raises(ConfigurationError, match="`chat_template` is true, and the tokenizer has no template"):
            Causal("some/model", chat_template=True).text_format(tokenizer)

    def test_more_tokens_than_positions_are_refused(self, tokenizer):
        backbone = RandomCausal(dict(FAMILIES["gpt2"]))
        backbone.build(tokenizer)
        backbone.check_lengths(1000, 24)
        with pytest.raises(ConfigurationError, match=r"1025 tokens together, and the model \(random gpt2\) has 1024"):
            backbone.check_lengths(1000, 25)
        made("t5", tokenizer).check_lengths(5000, 5000)  # its positions are relative


class TestInnerParameters:
    """What theta is."""

    def test_by_name(self, tokenizer):
        backbone = made("llama", tokenizer, ByName(["*.layers.1.*", "*norm*"]))
        learned = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
        assert learned == {n for n, _ in backbone.model.named_parameters() if ".layers.1." in n or "norm" in n}
        with pytest.raises(ConfigurationError, match=r"No parameter of LlamaForCausalLM matches `decoder\.\*`"):
            made("llama", tokenizer, ByName(["decoder.*"]))

    @pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer.h.1."), ("t5", "decoder.block.0.")])
    def test_last_layers(self, name, prefix, tokenizer):
        backbone = made(name, tokenizer, LastLayers(1))
        learned = {n for n, p in backbone.model.named_parameters() if p.requires_grad}
        assert learned == {n for n, _ in backbone.model.named_parameters() if n.startswith(prefix)}
        with pytest.raises(ConfigurationError, match=r"`layers` of LastLayers is 9, and \w+ has 2"):
            made(name, tokenizer, LastLayers(9))

    @pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
    def test_lora_makes_theta_small_and_leaves_the_model_as_it_is(self, name, tokenizer):
        backbone = made(name, tokenizer, LoRA(rank=2))
        theta = [p for p in backbone.parameters() if p.requires_grad]
        assert all("lora" in n for n, p in backbone.named_parameters() if p.requires_grad)
        assert sum(p.numel() for p in theta) < 0.2 * sum(p.numel() for p in backbone.parameters())
        frozen = {n: p.detach().clone() for n, p in backbone.named_parameters() if not p.requires_grad}
        batch = rows(backbone, tokenizer, TEXTS, TARGETS)
        phi = nn.Parameter(torch.randn(3, 2, 16))
        problem = BilevelProblem(
            lambda: backbone.loss(batch, InstructionEmbeddings(phi, torch.ones(3, 2, dtype=torch.bool))),
            lambda: backbone.loss(batch),
            theta,
            [phi],
        )
        assert Chebyshev(products=2)(problem).gradient[0].norm() > 0
        optimizer = torch.optim.SGD(theta, lr=0.1)
        before = backbone.loss(batch)
        before.backward()
        optimizer.step()
        assert backbone.loss(batch) < before
        assert all(torch.equal(p, frozen[n]) for n, p in backbone.named_parameters() if n in frozen)

    def test_a_base_in_half_precision_beside_adapters_in_single(self, tokenizer):
        backbone = made("llama", tokenizer, LoRA(rank=2, base_dtype="bfloat16"))
        precisions = {p.requires_grad: p.dtype for p in backbone.parameters()}
        assert precisions == {True: torch.float32, False: torch.bfloat16}
        assert backbone.embed(torch.tensor([3])).dtype == torch.float32
        assert backbone.loss(rows(backbone, tokenizer, TEXTS, TARGETS)).dtype == torch.float32

    @pytest.mark.parametrize("method", [{"peft_type": "IA3"}, {"peft_type": "LOHA", "r": 2}, {"peft_type": "BITFIT"}])
    def test_any_method_that_adapts_layers(self, method, tokenizer):
        options = {} if method["peft_type"] != "LOHA" else {"target_modules": ["q_proj"]}
        if method["peft_type"] == "BITFIT":
            with pytest.raises(ConfigurationError, match="is not one of PEFT"):
                made("llama", tokenizer, Adapter(method))
            return
        backbone = made("llama", tokenizer, Adapter(method | options))
        learned = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        assert 0 < learned < 0.2 * sum(p.numel() for p in backbone.parameters())

    def test_adapters_that_are_instructions_and_layers_that_are_not_there_are_refused(self, tokenizer):
        with pytest.raises(ConfigurationError, match="PROMPT_TUNING of PEFT puts vectors before the input"):
            made("llama", tokenizer, Adapter({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
        with pytest.raises(ConfigurationError, match="PEFT cannot adapt LlamaForCausalLM by LORA: Target modules"):
            made("llama", tokenizer, LoRA(target_modules=["no_such_layer"]))


def test_other_random_models_are_refused(tokenizer):
    with pytest.raises(ConfigurationError, match="needs a `model_type` such as `t5` or `llama`"):
        RandomCausal({"hidden_size": 8})
    with pytest.raises(ConfigurationError, match="makes no causal model"):
        RandomCausal({"model_type": "t5"}).build(tokenizer)
    with pytest.raises(ConfigurationError, match="Cannot load `no/such/model` as a causal model"):
        Causal("no/such/model").build(tokenizer)
