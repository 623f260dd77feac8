"""Rows of a dialogue are what the tokenizer makes of the whole dialogue, whatever its template and its seams."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diopt_lightning import ConfigurationError
from diopt_lightning.backbones import Causal
from diopt_lightning.data.text_format import ChatFormat, chat_format
from tests.templates import JOINED, REFUSED, TEMPLATES, TOKENIZERS, trained

ARGUMENTS = {"enable_thinking": False, "date_string": "1 May 2024"}
TEXT = st.text("abcXY 7.,:()\n\"'\u597d\u00e9\u2581", min_size=1, max_size=12)


@cache
def made(kind: str, name: str) -> ChatFormat:
    tokenizer = trained(kind)
    tokenizer.chat_template = TEMPLATES[name]
    return chat_format(tokenizer, ARGUMENTS)


def whole(kind: str, template: str, question: str, answer: str) -> list[int]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return trained(kind).apply_chat_template(turns, chat_template=template, return_dict=False, **ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in TEMPLATES for kind in TOKENIZERS if (name, kind) not in JOINED]
)
@settings(max_examples=5, database=None, deadline=None)
@given(question=TEXT.map(lambda text: f"Q{text}\nOutput: "), answer=TEXT.map(lambda text: f"A{text}".strip()))
def test_a_row_is_what_the_tokenizer_makes_of_the_dialogue(name, kind, question, answer):
    text_format, tokenizer = made(kind, name), trained(kind)
    tokenizer.chat_template = TEMPLATES[name]
    source, source_cut = text_format.source(tokenizer, question, 1000)
    target, target_cut = text_format.target(tokenizer, answer, 1000)
    assert not source_cut
    assert not target_cut
    assert source + target == whole(kind, TEMPLATES[name], question, answer)
    assert tuple(source[: len(text_format.before)]) == text_format.before
    assert text_format.stop in target[-len(text_format.target_after) :]
    assert tokenizer.convert_ids_to_tokens(text_format.stop) in ("</s>", "<|im_end|>")
    cut, _ = text_format.target(tokenizer, answer * 9, len(text_format.target_after) + 2)
    assert tuple(cut[2:]) == text_format.target_after


@pytest.mark.parametrize(("name", "kind"), JOINED)
def test_seams_that_a_tokenizer_joins_are_refused_with_the_difference(name, kind):
    with pytest.raises(ConfigurationError, match=r"cannot be taken apart .* stands where .* is expected"):
        made(kind, name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_taken_apart_is_refused(name):
    template, message = REFUSED[name]
    tokenizer = trained("byte level")
    tokenizer.chat_template = template
    with pytest.raises(ConfigurationError, match=message):
        chat_format(tokenizer)


def test_an_answer_that_the_template_takes_apart_is_refused_with_the_difference():
    tokenizer = trained("byte level")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% elif '#' in m['content'] %}"
        "<|user|>{{ m['content'] }}</s>{% else %}<|assistant|>{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    text_format = chat_format(tokenizer)
    with pytest.raises(
        ConfigurationError, match=r"joins the answer '# 1' .*<\|user\|>.* stands where .*<\|assistant\|>"
    ):
        text_format.target(tokenizer, "# 1", 50)


def test_arguments_reach_the_template():
    tokenizer = trained("byte level")
    tokenizer.chat_template = TEMPLATES["date by argument"]
    backbone = Causal("some/model", chat_template=True, template_arguments={"date_string": "2 May"})
    source, _ = backbone.text_format(tokenizer).source(tokenizer, "Who?", 100)
    assert "Today is 2 May." in tokenizer.decode(source)
    with pytest.raises(ConfigurationError, match="`template_arguments` are for a chat template"):
        Causal("some/model", template_arguments={"date_string": "2 May"})
