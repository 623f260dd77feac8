"""ROUGE and exact match of one prediction, as in the official evaluation of Super-NaturalInstructions."""

import string
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from diopt_lightning.data.tokenization import load_tokenizer
from diopt_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts that put no space between words, of which a character counts as one.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


class Words(Protocol):
    """What ROUGE compares texts by."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""


class OfficialCrossLingualWords:
    """Tokens of GPT-2 without the mark of a space, as the official evaluation has for its cross-lingual track."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer("gpt2")

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return [token.lstrip("Ġ") for token in self.tokenizer.tokenize(text)]


class WordsOfAnyScript:
    """Runs of letters and digits in lower case; characters, in scripts without spaces and of anything else."""

    def __init__(self) -> None:
        # Here, as are the libraries below, because training has no use for it.
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split

        words = Regex(rf"[{_UNSPACED}]\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}&&[^{_UNSPACED}]]+|\S")
        self.splitter = Split(words, behavior="removed", invert=True)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return [word for word, _ in self.splitter.pre_tokenize_str(text.lower())]


@cache
def _cross_lingual_words() -> Words:
    try:
        return OfficialCrossLingualWords()
    except ConfigurationError as error:
        rank_zero_warn(
            f"ROUGE of tasks in other languages than English is by words, and by characters in scripts without spaces: "
            f"such scores cannot be compared with the official ones, which are by the tokens of `gpt2`. {error}"
        )
        return WordsOfAnyScript()


@cache
def _scorer(rouge: str, cross_lingual: bool) -> "RougeScorer":
    # Here, so that training, which has no use for it, works where it is not installed.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([rouge], use_stemmer=True, tokenizer=_cross_lingual_words() if cross_lingual else None)


def in_another_script(texts: Sequence[str]) -> bool:
    """Whether most letters of some texts are none from a to z, which alone ROUGE's own tokenizer sees.

    Example:
        >>> in_another_script(["привет, world"]), in_another_script(["déjà vu"]), in_another_script(["42"])
        (True, False, False)
    """
    whole = "".join(texts)
    return not whole.isascii() and sum(1 if c > "\x7f" else -1 for c in whole if c.isalpha()) > 0


def rouge_l(prediction: str, references: Sequence[str], cross_lingual: bool | None = None) -> float:
    """ROUGE-L F-measure (Lin 2004), the maximum over the references, from 0 to 1.

    English texts are compared by their words with Porter stemming. Of other scripts the tokenizer of those sees
    nothing, so the official evaluation compares texts of its cross-lingual track by the tokens of GPT-2, loaded from
    the hub or its cache; where it cannot be, that is said once and words or characters stand for them.

    Args:
        prediction: The predicted text.
        references: The references.
        cross_lingual: Whether to compare as on the cross-lingual track. Default: if the references are
            :func:`in_another_script`.

    Example:
        >>> rouge_l("the cats sat", ["the cat sat down", "a dog"])
        0.8571428571428571
    """
    return _rouge("rougeL", prediction, references, cross_lingual)


def rouge_1(prediction: str, references: Sequence[str], cross_lingual: bool | None = None) -> float:
    """ROUGE-1 F-measure, of words in any order, the maximum over the references; else as :func:`rouge_l`.

    Example:
        >>> rouge_1("sat the cats", ["the cat sat down"])
        0.8571428571428571
    """
    return _rouge("rouge1", prediction, references, cross_lingual)


def _rouge(rouge: str, prediction: str, references: Sequence[str], cross_lingual: bool | None) -> float:
    scorer = _scorer(rouge, in_another_script(references) if cross_lingual is None else cross_lingual)
    return max(float(scorer.score(reference, prediction)[rouge].fmeasure) for reference in references)


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
