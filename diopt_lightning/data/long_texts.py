"""Texts that are far longer than what is kept of them are cut before they are tokenized."""

from collections.abc import Iterable
from functools import lru_cache

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from diopt_lightning.data.text_format import encode
from diopt_lightning.errors import ConfigurationError

# Characters that are tokenized for each token that is kept, at first; one of English has about 4.5.
CHARACTERS = 6
# Characters at the end of a text that stay, because a prompt asks for its output there.
END = 256
# What is read of a text that has no limit of its own: the official one of a source, and of a target.
SOURCE, TARGET = 1024, 128
# Tokenizers take about 200 bytes for a character. WordPiece takes words of up to 100 characters apart.
LARGEST, MARGIN = 10_000_000, 128


def shortened(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, before: str = "") -> str:
    """A text with the first and last ids of a far longer one, and more than ``tokens`` of them as that has.

    Any other text, and one whose first ids depend on all of it, is returned as it is: with T5's tokenizer those of an
    ``xxx...`` do, which is all ``xx`` but for an odd ``x`` at its beginning.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        tokens: How many of the first ids are kept.
        before: What is tokenized before it, in one piece.

    Raises:
        ConfigurationError: If such a text has more than ten million characters.
    """
    length = CHARACTERS * (tokens + _longest_word(tokenizer)) + MARGIN
    while 4 * length + END < len(text):
        if _is_decided(tokenizer, before + text[:length], tokens + len(before)):
            return text[:length] + text[-END:]
        length *= 8
    if len(text) > LARGEST:
        raise ConfigurationError(
            f"A text of {len(text):,} characters ({text[:40]!r}...), whose first tokens cannot be told from less than "
            f"the whole, is too long to be tokenized: shorten it to {LARGEST:,}."
        )
    return text


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[int]:
    """The first ids of a text, of which no more is tokenized than it takes to tell them."""
    return encode(tokenizer, shortened(tokenizer, text, tokens))[:tokens]


def definition_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], what: str) -> list[list[int]]:
    """The first 1024 ids of definitions; how many of them have more is said, by what they are called."""
    rows = [first_ids(tokenizer, text, SOURCE + 1) for text in texts]
    if cut := sum(len(row) > SOURCE for row in rows):
        rank_zero_info(f"{what}: {cut:,} of {len(rows):,} cut to {SOURCE} tokens")
    return [row[:SOURCE] for row in rows]


@lru_cache(maxsize=64)  # a long definition is the beginning of every prompt of its task
def _is_decided(tokenizer: PreTrainedTokenizerBase, beginning: str, tokens: int) -> bool:
    """Whether more than ``tokens`` of the first ids are the same, however a text goes on.

    Some token ends within as many characters from the end of the beginning as the longest word has, and what stands
    before its end is tokenized as it would be alone. So what all these ends agree on holds for every text.
    """
    longest = _longest_word(tokenizer)
    first = encode(tokenizer, beginning[: -longest - MARGIN])[: tokens + 1]
    ends = range(len(beginning) - longest, len(beginning) + 1)
    return len(first) > tokens and all(encode(tokenizer, beginning[:end])[: tokens + 1] == first for end in ends)


@lru_cache(maxsize=8)
def _longest_word(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(map(len, tokenizer.get_vocab()))
