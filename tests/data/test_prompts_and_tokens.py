"""Prompts letter by letter, token caches, batches and their order."""

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diopt_lightning import ConfigurationError
from diopt_lightning.data import Batch, Example, Instance, NaturalInstructionsDataModule, PromptFormat, Task
from diopt_lightning.data.prompts import render
from diopt_lightning.data.sampling import FILLING, EvaluationSampler, TrainSampler
from diopt_lightning.data.text_format import encoder_decoder_format
from diopt_lightning.data.tokenization import SourceTarget, load_tokenizer, tokenize
from tests.conftest import task_document

TASK = Task(
    name="task001_sums",
    categories=("Arithmetic",),
    definitions=(" Add the numbers ", "Another one"),
    positive_examples=(Example(" 1 + 1", "2", "One and one."), Example("2 + 2?", "4!", ""), Example("5", "5", "e")),
    negative_examples=(Example("1 + 2", "4", "Too many"),),
    instances=(Instance("a", "3 + 4 ", ("7",)),),
)
INPUT = "Now complete the following example -\nInput: 3 + 4.\nOutput: "
DEFINITION = "Definition: Add the numbers.\n\n"


@pytest.mark.parametrize(
    ("prompt_format", "expected"),
    [
        (PromptFormat(definition=False, positive_examples=0), INPUT),
        (PromptFormat(positive_examples=0), DEFINITION + INPUT),
        (PromptFormat(task_name=True, positive_examples=0), "task001_sums. " + DEFINITION + INPUT),
        (
            PromptFormat(),
            DEFINITION + " Positive Example 1 -\nInput: 1 + 1.\n Output: 2.\n\n"
            " Positive Example 2 -\nInput: 2 + 2?\n Output: 4!\n\n" + INPUT,
        ),
        (
            PromptFormat(definition=False, positive_examples=1, negative_examples=5, explanations=True),
            " Positive Example 1 -\nInput: 1 + 1.\n Output: 2.\n Explanation: One and one.\n\n"
            " Negative Example 1 -\nInput: 1 + 2.\n Output: 4.\n Explanation: Too many.\n\n" + INPUT,
        ),
    ],
)
def test_prompts_are_the_official_ones(prompt_format, expected):
    prompt = render(TASK, TASK.instances[0].input, prompt_format, fits=lambda text: True)
    assert prompt.text == expected
    assert prompt.dropped_examples == 0


def test_the_first_example_that_does_not_fit_is_dropped_with_those_of_its_kind_that_follow():
    everything = PromptFormat(positive_examples=3, negative_examples=1)
    full = render(TASK, "3 + 4", everything, fits=lambda text: True).text
    second_positive = " Positive Example 2 -\nInput: 2 + 2?\n Output: 4!\n\n"
    # Only a prompt with the second positive example is too long: the third would fit, and goes with it.
    prompt = render(TASK, "3 + 4", everything, fits=lambda text: second_positive not in text)
    third_positive = " Positive Example 3 -\nInput: 5.\n Output: 5.\n\n"
    assert prompt.text == full.replace(second_positive, "").replace(third_positive, "")
    assert prompt.dropped_examples == 2


def module(root: Path, **options: Any) -> NaturalInstructionsDataModule:
    defaults = {"validation_tasks": 2, "dev_tasks": 1, "cache_dir": str(root / "cache"), "batch_size": 4}
    return NaturalInstructionsDataModule(str(root), str(root / "tokenizer"), **defaults | options)


def prepared(root: Path, **options: Any) -> NaturalInstructionsDataModule:
    data = module(root, **options)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data


def rows(data: NaturalInstructionsDataModule, split: str) -> list[dict]:
    return list(data._rows[split])


def test_rows_hold_the_tokens_of_prompt_and_targets(layout):
    data = prepared(layout())
    task = data.tasks[0]
    row = next(row for row in rows(data, "train") if (row["task"], row["instance"]) == (0, 3))
    text = data.tokenizer.decode(row["input_ids"])
    assert text == f"now complete the following example - input : {task.instances[3].input} . output : </s>"
    assert [data.tokenizer.decode(ids) for ids in row["targets"]] == ["fire </s>", "fish </s>"]
    validation = data.tokenizer.decode(rows(data, "validation")[0]["input_ids"])
    assert validation.startswith("definition : name the castle . positive example 1 -")


def cache_files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (root / "cache").rglob("*.arrow")}


def test_a_second_start_reuses_the_cache_and_a_change_does_not(layout):
    root = layout()
    prepared(root)
    first = cache_files(root)
    assert first
    prepared(root)
    assert cache_files(root) == first
    changes = [
        {"max_source_length": 20},
        {"max_target_length": 1},
        {"train_prompt": PromptFormat(positive_examples=1)},
        {"instances_per_task": 5},
        {"split_seed": 3},
    ]
    for change in changes:
        before = cache_files(root)
        prepared(root, **change)
        assert set(cache_files(root)) > set(before), change
    before = cache_files(root)
    layout({"task002": task_document("task002", Definition=["The river"])})
    data = prepared(root)
    assert set(cache_files(root)) > set(before)
    split = next(s for s in ("train", "validation", "dev") if "task002" in getattr(data.splits, s))
    if split != "train":
        texts = [data.tokenizer.decode(row["input_ids"]) for row in rows(data, split)]
        assert any("definition : the river" in text for text in texts)


def test_what_is_cut_or_dropped_is_counted_and_said(layout, caplog):
    root = layout(
        {"task003": task_document("task003", Instances=[{"id": "x", "input": "apple " * 40, "output": [""]}])}
    )
    with caplog.at_level("INFO"):
        data = prepared(
            root, max_source_length=25, max_target_length=1, split_seed=0, train_prompt=PromptFormat(), dev_tasks=0
        )
    train = next(record.message for record in caplog.records if record.message.startswith("train:"))
    assert sum(record.message == train for record in caplog.records) == 1
    counts = {key: sum(row[key] for row in rows(data, "train")) for key in ("cut_targets", "dropped_examples")}
    assert all(count > 0 for count in counts.values())
    assert f"{counts['cut_targets']} targets cut" in train
    assert f"{counts['dropped_examples']} examples dropped" in train
    assert all(len(row["input_ids"]) <= 25 and row["input_ids"][-1] == 1 for row in rows(data, "train"))
    said = " ".join(record.message for record in caplog.records)
    assert "1 sources cut at the length limit" in said
    assert "1 instances with an empty reference" in said


@pytest.mark.parametrize("outputs", [["§"], ["§ §", "fire"], ["§ fire"], [""], ["</s>"]])
def test_targets_that_say_nothing_to_the_model_are_counted(layout, caplog, outputs):
    instances = [{"id": str(index), "input": "apple", "output": outputs} for index in range(3)]
    with caplog.at_level("INFO"):
        prepared(layout({"task100": task_document("task100", Instances=instances)}))
    said = next(record.message for record in caplog.records if record.message.startswith("test:"))
    counted = "3 targets of nothing but what the tokenizer does not know" in said
    assert counted == (outputs[0] in ("§", "§ §", "</s>"))


def test_targets_of_unknown_characters_are_counted_with_the_real_tokenizer(t5_tokenizer, tmp_path):
    tokenizer = load_tokenizer(str(t5_tokenizer))
    outputs = ("<", "{ }", "{a", "a", "")
    task = dataclasses.replace(TASK, instances=(Instance("a", "b", outputs),))
    options = SourceTarget(PromptFormat(), encoder_decoder_format(tokenizer), 64, 8)
    (row,) = tokenize([(0, task, [0])], tokenizer, options, tmp_path)
    assert row["unknown_targets"] == 2


def test_batches_are_padded_and_labels_masked(layout):
    batch = next(iter(prepared(layout()).train_dataloader()["inner"]))
    assert isinstance(batch, Batch)
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert torch.equal(batch.input_ids == 0, batch.attention_mask == 0)
    assert set(batch.labels[:, -1].tolist()) <= {-100, 1}
    assert batch.task.max() < 5


def test_the_order_is_a_pure_function_of_seed_and_step():
    lengths = [(7 * i) % 23 for i in range(103)]
    first, again = (TrainSampler(lengths, batch_size=4, seed=0) for _ in range(2))
    stream = list(islice(first, 60))
    assert [again.batch(step) for step in reversed(range(60))] == stream[::-1]
    again.start = 37
    assert list(islice(again, 23)) == stream[37:]
    assert list(islice(TrainSampler(lengths, batch_size=4, seed=1), 60)) != stream


def test_a_pass_has_every_row_and_the_next_one_another_order():
    sampler = TrainSampler(list(range(103)), batch_size=4, seed=0)
    assert len(sampler) == 26
    passes = [[index for step in range(26) for index, _ in sampler.batch(26 * p + step)] for p in range(2)]
    assert all(set(indices) == set(range(103)) for indices in passes)
    assert all(sum(Counter(indices).values()) - 103 == 1 for indices in passes)
    assert passes[0] != passes[1]


def test_batches_group_similar_lengths():
    lengths = torch.randint(1, 1000, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = TrainSampler(lengths, batch_size=10, seed=0)
    spreads = [max(ls) - min(ls) for ls in ([lengths[i] for i, _ in sampler.batch(s)] for s in range(200))]
    assert sorted(spreads)[100] < 50  # of 1000; unsorted batches spread over 800


def test_processes_share_the_global_batch():
    lengths = [5, 3, 8, 1, 9, 2, 7]
    whole = TrainSampler(lengths, batch_size=4, seed=0)
    parts = [TrainSampler(lengths, batch_size=2, seed=0, num_replicas=2, rank=rank) for rank in range(2)]
    for step in range(6):
        assert sorted(whole.batch(step)) == sorted(parts[0].batch(step) + parts[1].batch(step))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    batch_size=st.integers(1, 4),
    replicas=st.integers(1, 5),
)
def test_every_row_is_evaluated_once_in_equally_many_batches_of_each_process(lengths, batch_size, replicas):
    shares = [list(EvaluationSampler(lengths, batch_size, replicas, rank)) for rank in range(replicas)]
    draws = [draw for share in shares for batch in share for draw in batch]
    assert sorted(index for index, number in draws if number != FILLING) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(batch) <= batch_size for share in shares for batch in share)


def test_one_reference_is_drawn_at_random_for_training(layout):
    data = prepared(layout())
    loader = iter(data.train_dataloader()["inner"])
    labels = Counter(label for _ in range(30) for label in next(loader).labels[:, 0].tolist())
    assert set(labels) == set(data.tokenizer.convert_tokens_to_ids(["fire", "fish"]))
    assert min(labels.values()) > 40  # of 120


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_saved(layout, workers):
    data = prepared(layout(), num_workers=workers)
    uninterrupted = [batch.instance.tolist() for batch in islice(data.train_dataloader()["inner"], 9)]
    loader = data.train_dataloader()["inner"]
    before = [batch.instance.tolist() for batch in islice(loader, 5)]
    resumed = data.train_dataloader()["inner"]
    resumed.load_state_dict(loader.state_dict())
    assert before + [batch.instance.tolist() for batch in islice(resumed, 4)] == uninterrupted


def test_test_instances_are_the_first_and_train_instances_are_drawn(layout):
    data = prepared(layout(), instances_per_task=4, test_instances_per_task=4)
    assert [row["instance"] for row in rows(data, "test")] == [0, 1, 2, 3] * 2
    drawn = [row["instance"] for row in rows(data, "train")]
    assert len(drawn) == 4 * len(data.splits.train)
    assert drawn != [0, 1, 2, 3] * len(data.splits.train)


def test_real_prompts_with_the_real_tokenizer(real_data, t5_tokenizer, tmp_path):
    data = NaturalInstructionsDataModule(
        str(real_data), str(t5_tokenizer), instances_per_task=2, test_instances_per_task=2, cache_dir=str(tmp_path)
    )
    data.prepare_data()
    data.setup("test")
    row = rows(data, "test")[0]
    text = data.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text.startswith("Definition: ")
    assert " Positive Example 2 - Input: " in text
    assert text.endswith(" Output:")
    assert max(rows(data, "test"), key=lambda row: row["length"])["length"] <= 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"`data\.batch_size` must be 1 or more, got 0"),
        ({"max_source_length": -5}, r"`data\.max_source_length` must be 1 or more, got -5"),
        ({"validation_tasks": 8}, r"`data\.validation_tasks` is 8, which takes 8 of the 8 tasks"),
        ({"dev_tasks": 0.5, "validation_tasks": 5}, None),
    ],
)
def test_bad_options_are_named(layout, options, message):
    root = layout()
    if message is None:
        assert len(module(root, **options).splits.train) == 1
        return
    with pytest.raises(ConfigurationError, match=message):
        module(root, **options).prepare_data()


def test_a_tokenizer_without_an_end_token_is_an_error(layout):
    root = layout()
    data = module(root)
    data.tokenizer.eos_token = None
    data.tokenizer.save_pretrained(root / "tokenizer")
    with pytest.raises(ConfigurationError, match="has no eos token"):
        module(root).prepare_data()


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(layout):
    root = layout()
    data = module(root)
    end = data.tokenizer.eos_token_id
    data.tokenizer.pad_token = None
    data.tokenizer.save_pretrained(root / "tokenizer")
    assert module(root).tokenizer.pad_token_id == end


def test_an_unknown_tokenizer_is_named(layout):
    root = layout()
    with pytest.raises(ConfigurationError, match="Cannot load `no/tokenizer/here` as a tokenizer"):
        NaturalInstructionsDataModule(str(root), "no/tokenizer/here").prepare_data()
