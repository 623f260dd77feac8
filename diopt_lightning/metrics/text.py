"""ROUGE-L and exact match of one prediction, as in the official evaluation of Super-NaturalInstructions."""

import string
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _scorer() -> "RougeScorer":
    # Here, so that training, which has no use for it, works where it is not installed.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure with Porter stemming (Lin 2004), the maximum over the references, from 0 to 1.

    Example:
        >>> rouge_l("the cats sat", ["the cat sat down", "a dog"])
        0.8571428571428571
    """
    return max(float(_scorer().score(reference, prediction)["rougeL"].fmeasure) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference in lower case, without punctuation, with white space folded, else 0.

    Articles are kept, unlike in SQuAD's evaluation.

    Example:
        >>> exact_match("Yes,  it is", ["yes it is."])
        1.0
    """
    return float(max(_normalize(prediction) == _normalize(reference) for reference in references))


def _normalize(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())
