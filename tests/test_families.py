"""Every family of transformers' models that can be made small works, or is refused by name before training."""

import re

import pytest

from diopt_lightning import ConfigurationError
from diopt_lightning.backbones import RandomCausal, RandomSeq2Seq
from tests.backbones import (
    Make,
    check_generation_does_not_depend_on_other_rows,
    check_generation_is_what_is_predicted,
    check_instructions_are_read_as_text,
    check_losses_do_not_depend_on_other_rows,
    some_tokenizer,
)
from tests.families import CAUSAL, ENCODER_DECODER, LARGE, small

REFUSED = {
    "cpmant": "does not take vectors",
    "deepseek_v4": "does not take vectors",
    "fsmt": "does not take vectors",
    "prophetnet": "predicts a token by later ones and by other rows",
    "xlnet": "sees the tokens that it is to predict",
}
# One of each kind of position, state, mask and way to generate; the others take minutes.
QUICK = ["bamba", "bloom", "ctrl", "mixtral", "recurrent_gemma", "roberta", "rwkv", "seamless_m4t", "trocr"]


def marked(names: list[str]) -> list[object]:
    """The families that are not large, most of them slow."""
    quick = {*QUICK, *REFUSED}
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names if name not in LARGE
    ]


def works_or_is_refused(make: Make, name: str) -> None:
    if name in REFUSED:
        with pytest.raises(ConfigurationError, match=re.escape(f"random {name}") + f".*{REFUSED[name]}"):
            make().build(some_tokenizer())
        return
    try:
        make().build(some_tokenizer())
    except ConfigurationError as error:
        if name in QUICK or name not in str(error):
            raise
        pytest.skip(str(error))
    check_instructions_are_read_as_text(make)
    check_losses_do_not_depend_on_other_rows(make)
    check_generation_does_not_depend_on_other_rows(make)
    check_generation_is_what_is_predicted(make)


@pytest.mark.parametrize("name", marked(CAUSAL))
def test_a_causal_family_works_or_is_refused_by_name(name):
    works_or_is_refused(lambda **options: RandomCausal(small(name), **options), name)


@pytest.mark.parametrize("name", marked(ENCODER_DECODER))
def test_an_encoder_decoder_family_works_or_is_refused_by_name(name):
    works_or_is_refused(lambda **options: RandomSeq2Seq(small(name), **options), name)


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ConfigurationError, match=r"BertLMHeadModel \(random bert\) sees the tokens .* `is_decoder`"):
        RandomCausal(small("bert") | {"is_decoder": False}).build(some_tokenizer())
