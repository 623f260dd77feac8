"""Metrics against an independent implementation of the official evaluation."""

import re
import string
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import TokenizersBackend

from diopt_lightning import ConfigurationError, metrics
from diopt_lightning.data import Instance, Task
from diopt_lightning.data.tasks import read_tasks
from diopt_lightning.metrics import (
    METRICS,
    ExactMatch,
    Rouge1,
    RougeL,
    TaskMetric,
    exact_match,
    in_other_languages,
    rouge_l,
)
from diopt_lightning.metrics.text import _cross_lingual_words, _scorer

STEMMER = PorterStemmer()


def stem(word: str) -> str:
    return STEMMER.stem(word) if len(word) > 3 else word


def slow_rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of stemmed words, by the textbook recursion."""

    def words(text: str) -> list[str]:
        found = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
        return [stem(word) for word in found]

    a, b = words(prediction), words(reference)
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def slow_rouge_1(prediction: str, reference: str) -> float:
    """The same of the words in order of the alphabet: their longest common subsequence is what is common at all."""
    a, b = (
        " ".join(sorted(re.sub(r"[^a-z0-9]+", " ", text.lower()).split(), key=stem)) for text in (prediction, reference)
    )
    return slow_rouge_l(a, b)


def slow_exact_match(prediction: str, reference: str) -> bool:
    def normal(text: str) -> str:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(text.split())

    return normal(prediction) == normal(reference)


# One line a metric: its class, and one prediction's score against one reference by an implementation of its own.
SCORES: list[tuple[type[TaskMetric], Callable[[str, str], float]]] = [
    (RougeL, slow_rouge_l),
    (ExactMatch, slow_exact_match),
    (Rouge1, slow_rouge_1),
]


def test_every_metric_is_in_the_list():
    exported = [getattr(metrics, name) for name in metrics.__all__]
    listed = {metric for metric, _ in SCORES}
    assert listed == {each for each in exported if isinstance(each, type)} - {TaskMetric} == set(METRICS.values())


TEXT = st.text(st.sampled_from("aab bcing sed.,'!?\n\tThe É9-"), max_size=40) | st.text(max_size=12)


ITEMS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.sampled_from("xyz")), min_size=1)


def equals_the_score(metric_class: type[TaskMetric], slow: Callable[[str, str], float], items: list[Any]) -> None:
    """Check all means of a metric against scores computed one by one."""
    metric = metric_class({"x": "A", "y": "B", "z": "A"}, dict.fromkeys("xyz", False))
    metric.update(*[list(column) for column in zip(*items, strict=True)])
    found = metric.compute()
    scores = [(task, 100 * max(slow(text, ref) for ref in refs)) for text, refs, task in items]
    groups = {"all": "xyz", "category/A": "xz", "category/B": "y", "task/x": "x", "task/y": "y", "task/z": "z"}
    for group, members in groups.items():
        values = [score for task, score in scores if task in members]
        assert (group in found) == bool(values)
        if values:
            assert found[group].item() == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.filterwarnings("ignore:Rouge.* of English")
@pytest.mark.parametrize(("metric", "slow"), SCORES)
@settings(max_examples=150, deadline=None)
@given(items=ITEMS)
def test_equals_an_independent_implementation(metric, slow, items):
    equals_the_score(metric, slow, items)


def test_known_values():
    assert rouge_l("the cat", ["a dog", "The Cats!"]) == 1.0
    assert rouge_l("", ["x"]) == 0.0
    assert exact_match("The  answer", ["answer"]) == 0.0  # articles are kept
    assert exact_match("it's 3.5", ["ITS 35"]) == 1.0


def adds_up_and_resets(metric: type[TaskMetric]) -> None:
    whole, parts = metric({"t": "c"}), metric({"t": "c"})
    whole.update(["a b", "c"], [["a"], ["c"]], ["t", "t"])
    parts.update(["a b"], [["a"]], ["t"])
    parts.update(["c"], [["c"]], ["t"])
    assert torch.equal(whole.compute()["all"], parts.compute()["all"])
    parts.reset()
    assert parts.compute() == {}


@pytest.mark.parametrize("metric", [metric for metric, _ in SCORES])
def test_updates_add_up_and_reset(metric):
    adds_up_and_resets(metric)


SCRIPTS = {
    "Chinese": "今天天气很好我们去公园",
    "Japanese": "今日はとても良い天気です",
    "Thai": "วันนี้อากาศดีมาก",
    "Korean": "오늘은 날씨가 좋다",
    "Russian": "сегодня хорошая погода",
    "Hindi": "आज मौसम अच्छा है",
    "Arabic": "الطقس جميل اليوم",
    "Greek": "καλός καιρός σήμερα",
    "mixed": "2021年春天 ok?",
}


@pytest.mark.parametrize("language", SCRIPTS)
@pytest.mark.parametrize("metric", [rouge_l, exact_match])
def test_a_text_of_any_script_equals_itself_and_no_other(metric, language):
    said = SCRIPTS[language]
    assert metric(said, [said]) == 1.0
    assert metric("", [said]) == metric("the cat", [said]) == 0.0
    if metric is rouge_l:
        assert 0 < rouge_l(said[: len(said) // 2], [said]) < 1


def foreign_task(name: str, outputs: list[str], *languages: str) -> Task:
    instances = tuple(Instance(f"{name}-{index}", "x", (output,)) for index, output in enumerate(outputs))
    return Task(name, ("c",), ("d",), (), (), instances, languages=languages)


def test_a_task_is_scored_in_the_way_of_its_language_and_what_nothing_sees_is_said_once():
    tasks = [
        foreign_task("named", ["bonjour"], "English", "French"),
        foreign_task("written", ["привет мир", "да", "ok"]),
        foreign_task("english", ["a long reference", "Πρόδρομος"], "English", "English"),
    ]
    languages = {task.name: in_other_languages(task) for task in tasks}
    assert languages == {"named": True, "written": True, "english": False}
    metric = RougeL({task.name: "c" for task in tasks}, languages)
    with pytest.warns(UserWarning, match=r"RougeL of English tasks sees nothing .* \"Πρόδρομος\" of `english` score 0"):
        metric.update(["Πρόδρομος", "да"], [["Πρόδρομος"], ["да"]], ["english", "written"])
    with warnings.catch_warnings(action="error"):
        metric.update(["Πρόδρομος"], [["Πρόδρομος"]], ["english"])
    assert metric.compute()["task/english"] == 0
    assert metric.compute()["task/written"] == 100


@pytest.mark.filterwarnings("ignore:Rouge.* of English")
def test_english_tasks_are_scored_as_on_the_official_default_track(real_data):
    official = RougeScorer(["rougeL"], use_stemmer=True)
    names = sorted(path.stem for path in (real_data / "tasks").glob("*.json"))[::8]
    greek = "task344_hybridqa_answer_generation"  # one of its answers is in Greek
    for task in read_tasks(real_data, [*names, greek]).values():
        outputs = [output for instance in task.instances for output in instance.outputs]
        outputs = [*outputs[:4], *[output for output in outputs if not output.isascii()][:4]]
        metric = RougeL({task.name: "c"}, {task.name: in_other_languages(task)})
        metric.update(outputs, [outputs] * len(outputs), [task.name] * len(outputs))
        scores = [max(official.score(reference, said)["rougeL"].fmeasure for reference in outputs) for said in outputs]
        assert metric.total.item() == sum(scores), task.name
    assert 0 in scores


def test_the_official_cross_lingual_tokenizer_is_taken_where_it_can_be_loaded(tmp_path):
    # A folder of that name in the working folder stands for the hub.
    letters = Tokenizer(BPE({letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    TokenizersBackend(tokenizer_object=letters, eos_token="!").save_pretrained(tmp_path / "gpt2")
    _cross_lingual_words.cache_clear(), _scorer.cache_clear()
    try:
        # By bytes, where a space is an empty word.
        assert _cross_lingual_words().tokenize("й a") == ["Ð", "¹", "", "a"]
        assert rouge_l("д", ["да"]) == 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)
        assert rouge_l("cats", ["cat"]) == 1.0
    finally:
        _cross_lingual_words.cache_clear(), _scorer.cache_clear()


@pytest.mark.parametrize("metric", [metric for metric, _ in SCORES])
@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu")])
def test_a_module_in_half_precision_scores_as_any_other(metric, convert):
    plain, converted = metric({"t": "c"}), convert(metric({"t": "c"}))
    for number in range(301):
        for each in (plain, converted):
            each.update([str(number % 3)], [["1"]], ["t"])
    assert torch.equal(convert(converted).compute()["all"], plain.compute()["all"])
    converted.reset()
    assert converted.total.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [], ["t"]), "1 predictions, 0 lists of references and 1 tasks"),
        ((["a"], [[]], ["t"]), r"Prediction 0 \(task `t`\) has no reference"),
        ((["a"], [["b"]], ["u"]), "The task `u` of prediction 0 is none of this metric's tasks"),
    ],
)
def test_bad_updates_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RougeL({"t": "c"}).update(*arguments)


def test_no_tasks_is_an_error():
    with pytest.raises(ConfigurationError, match="RougeL needs one task at least"):
        RougeL({})
