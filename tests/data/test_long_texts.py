"""Texts that are far longer than what is kept of them, and how the official trainer cuts."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import PreTrainedTokenizerFast

from diopt_lightning import ConfigurationError, callbacks
from diopt_lightning.data import Example, Instance, PromptFormat, Task, long_texts, text_format, tokenization
from diopt_lightning.data.long_texts import first_ids, shortened
from diopt_lightning.data.synthetic import word_tokenizer
from diopt_lightning.data.tasks import read_tasks
from diopt_lightning.data.text_format import ASKS, causal_format, encode, encoder_decoder_format
from diopt_lightning.data.tokenization import SourceTarget, load_tokenizer
from diopt_lightning.instructions import CandidatePool, EmbedderFromDefinition, TokenWise
from diopt_lightning.instructions.candidates import tokenize_candidates
from diopt_lightning.instructions.conversion import example_batch
from diopt_lightning.instructions.initialization import Definition, Exemplar

UNITS = st.text("abx {1.\u00e9\u4eca\n", min_size=1, max_size=5)


def check(tokenizer, unit, times, end, tokens):
    text = "a" + unit * times + end + ASKS
    asking = len(encode(tokenizer, ASKS))
    short = shortened(tokenizer, text, tokens)
    whole, ids = encode(tokenizer, text), encode(tokenizer, short)
    assert ids[:tokens] == whole[:tokens]
    assert (len(ids) > tokens) == (len(whole) > tokens)
    assert ids[-asking:] == whole[-asking:]
    assert first_ids(tokenizer, text, tokens) == whole[:tokens]
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


def converted(tokenizer: Any, tasks: list[Task]) -> list[Any]:
    embedder = EmbedderFromDefinition(TokenWise(max_length=16))
    embedder.build(tasks, tokenizer, nn.Embedding(len(tokenizer), 4))
    return embedder.definition_ids.tolist()


def compared(tokenizer: Any, tasks: list[Task]) -> list[Any]:
    callback, data = callbacks.LearnedInstructions(), SimpleNamespace(tokenizer=tokenizer, split_tasks=lambda _: tasks)
    callback.moments = [{}]
    callback.on_train_start(SimpleNamespace(global_step=1), SimpleNamespace(data=data))
    return [ids.tolist() for ids in callback._definitions]


def candidates(tokenizer: Any, tasks: list[Task]) -> list[Any]:
    rows = [CandidatePool(definitions=True).candidates(task, 8) for task in tasks]
    return tokenize_candidates(rows, 8, 1, 40, False, True, tokenizer).ids.tolist()


def initial(kind: Any) -> Any:
    embedding = nn.Embedding(40_000, 2)
    return lambda tokenizer, tasks: kind()(tasks, 50, tokenizer, embedding).tolist()


# What reads texts of tasks beside the rows of training and evaluation.
READERS = {
    "the definitions that are converted": (converted, [1024, 1024]),
    "the definitions that instructions are compared with": (compared, [1024, 3]),
    "the instances that are described": (
        lambda t, tasks: [x.tolist() for x in example_batch(0, tasks[0], t)[:3]],
        None,
    ),
    "candidates": (candidates, None),
    "a definition to start from": (initial(Definition), None),
    "an example to start from": (initial(Exemplar), None),
}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_reads_texts_of_tasks_reads_little_of_long_ones(t5, reader, monkeypatch):
    monkeypatch.setattr(callbacks.instructions, "learns", lambda _: True)
    said: list[str] = []
    monkeypatch.setattr(long_texts, "rank_zero_info", said.append)
    read, lengths = READERS[reader]
    long = "The apple, a river and 12 castles. " * 1000
    example = (Example(long, long),)
    tasks = [
        dataclasses.replace(task(long, long, long), positive_examples=example),
        dataclasses.replace(task("The river.", "b", "c"), positive_examples=(Example("a", "b"),)),
    ]
    seen, whole = [], []
    original = text_format._ids
    monkeypatch.setattr(text_format, "_ids", lambda t, text, **o: seen.append(len(text)) or original(t, text, **o))
    found = read(t5, tasks)
    assert 100 < max(seen) < 10_000
    if lengths is not None:
        assert [len(row) for row in found] == lengths
        assert [line for line in said if line.endswith(": 1 of 2 cut to 1024 tokens")] == said != []
    monkeypatch.setattr(long_texts, "shortened", lambda tokenizer, text, *_: whole.append(len(text)) or text)
    assert found == read(t5, tasks)
    assert max(seen) == max(whole) > 30_000


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
