"""Texts that are far longer than what is kept of them, and how the official trainer cuts."""

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from diopt_lightning import ConfigurationError
from diopt_lightning.data import Example, Instance, PromptFormat, Task, long_texts, text_format, tokenization
from diopt_lightning.data.long_texts import shortened
from diopt_lightning.data.synthetic import word_tokenizer
from diopt_lightning.data.tasks import read_tasks
from diopt_lightning.data.text_format import ASKS, causal_format, encode, encoder_decoder_format
from diopt_lightning.data.tokenization import SourceTarget, load_tokenizer

UNITS = st.text("abx {1.\u00e9\u4eca\n", min_size=1, max_size=5)


def check(tokenizer, unit, times, end, tokens):
    text = "a" + unit * times + end + ASKS
    asking = len(encode(tokenizer, ASKS))
    short = shortened(tokenizer, text, tokens)
    whole, ids = encode(tokenizer, text), encode(tokenizer, short)
    assert ids[:tokens] == whole[:tokens]
    assert (len(ids) > tokens) == (len(whole) > tokens)
    assert ids[-asking:] == whole[-asking:]
    return len(short) < len(text)


def no_pre_tokenizer():
    """BPE in which words are no boundary, as Llama's."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    texts = ["a bab abba xx xxx x 11 1.1 ab\nab {{ab}}", "\nOutput:", "xxab 1x1 aba"]
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@settings(max_examples=40, deadline=None)
@example(unit="x", times=4001, end="")
@example(unit="x", times=4002, end="")
@example(unit="ab", times=2000, end="b")
@given(unit=UNITS, times=st.integers(600, 1500), end=UNITS)
def test_the_first_and_last_ids_of_a_long_text_are_those_of_the_whole(t5, bpe, unit, times, end):
    for tokenizer in (t5, bpe, word_tokenizer(["a", "output"])):
        check(tokenizer, unit, times, end, 12)


@pytest.fixture(scope="module")
def t5(t5_tokenizer):
    return load_tokenizer(str(t5_tokenizer))


@pytest.fixture(scope="module")
def bpe():
    return no_pre_tokenizer()


def test_what_is_cut_before_it_is_tokenized(t5):
    assert check(t5, "the river ", 2000, "", 32)  # a line
    assert check(t5, "a", 20000, "", 32)  # a word
    assert not check(t5, "x", 20000, "", 32)  # whose beginning depends on its end
    assert not check(t5, "{", 20000, "", 32)  # which is two tokens
    assert not check(t5, "the river ", 50, "", 32)


def task(definition: str, text: str, output: str) -> Task:
    instances = tuple(Instance(str(number), f"{number} {text}", (output,)) for number in range(3))
    return Task("task001", ("c",), (definition,), (Example("sun", "moon"),), (), instances)


@pytest.mark.parametrize("make_format", [encoder_decoder_format, causal_format])
@pytest.mark.parametrize("place", range(3))
def test_rows_of_long_texts_are_what_they_were_and_little_of_them_is_tokenized(t5, place, make_format, monkeypatch):
    texts = ["The river.", "castle", "bear"]
    texts[place] = "The apple, a river and 12 castles. " * 1500
    options = SourceTarget(PromptFormat(), make_format(t5), 48, 24)
    tokenized, original = [], text_format._ids

    def recorded(tokenizer: Any, text: str, **options: bool) -> list[int]:
        tokenized.append(len(text))
        return original(tokenizer, text, **options)

    monkeypatch.setattr(text_format, "_ids", recorded)
    found = list(tokenization._rows([(0, task(*texts), [0, 1, 2])], t5, options))
    assert max(tokenized) < 2000
    monkeypatch.setattr(tokenization, "shortened", lambda tokenizer, text, *_: text)
    assert found == list(tokenization._rows([(0, task(*texts), [0, 1, 2])], t5, options))
    assert max(tokenized) > 50_000
    assert found[0]["cut_targets" if place == 2 else "cut_source"] == 1


def test_what_is_too_long_to_be_told_by_its_beginning_is_refused_by_name(t5, monkeypatch):
    monkeypatch.setattr(long_texts, "LARGEST", 5_000)
    options = SourceTarget(PromptFormat(), encoder_decoder_format(t5), 48, 24)
    with pytest.raises(
        ConfigurationError, match=r"task001.json, field .*0\]: A text of 6,\d+ characters \('Definition"
    ):
        list(tokenization._rows([(0, task("x" * 6000, "a", "b"), [0])], t5, options))


def test_official_cutting_is_that_of_tk_instruct_to_the_id(real_data, t5):
    limit, differing = 40, 0
    plain = SourceTarget(PromptFormat(), encoder_decoder_format(t5), limit, 8)
    official = dataclasses.replace(plain, official_cutting=True)
    names = sorted(path.stem for path in (real_data / "tasks").glob("*.json"))[::16]
    texts = [row.input for task in read_tasks(real_data, names).values() for row in task.instances[:3]]
    for text in [*texts, "a b . { c } </s> d n't <e> " * 9, "a"]:
        ids, was_cut = official.source(t5, text)
        whole = t5(text)["input_ids"]
        read = text if len(whole) <= limit else t5.decode(whole[:limit], skip_special_tokens=True)
        assert ids == t5(read, max_length=limit, truncation=True)["input_ids"]
        assert was_cut == plain.source(t5, text)[1] == (len(whole) > limit)
        differing += ids != plain.source(t5, text)[0]
    assert differing > 0
    with pytest.raises(ConfigurationError, match="would leave a causal one without the words that ask"):
        SourceTarget(PromptFormat(), causal_format(t5), limit, 8, official_cutting=True)
