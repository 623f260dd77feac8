"""How a kind of model reads texts: what stands around a source and a target, as token ids."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from diopt_lightning.errors import ConfigurationError

# How a prompt asks for the output; see `render_input`.
ASKS = "\nOutput:"


@dataclass(frozen=True)
class TextFormat:
    """What stands around a source and a target.

    A source is ``[before ; text ; after]``, where a learned instruction enters behind ``before``; a target is
    ``[target_before ; text ; target_after]``.

    Args:
        before: Ids before a learned instruction and the source's text: a token that begins a sequence, or the opening
            of a turn in a dialogue.
        after: Ids after the source's text.
        target_before: Ids before a target.
        target_after: Ids after a target, the first of which ends a generated output.
        continued: What a target's text goes on from in one piece with the source, of which it is tokenized as the
            continuation. Empty where source and target are two sequences.
        separator: What stands between the two.

    Example:
        >>> from diopt_lightning.data.synthetic import word_tokenizer
        >>> tokenizer = word_tokenizer(["name", "the", "animal", "bear"])
        >>> text_format = encoder_decoder_format(tokenizer)
        >>> tokenizer.decode(text_format.source(tokenizer, "Name the animal", limit=8)[0])
        'name the animal </s>'
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    target_before: tuple[int, ...] = ()
    target_after: tuple[int, ...] = ()
    continued: str = ""
    separator: str = ""

    def source(self, tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> tuple[list[int], bool]:
        """Return the ids of a source, cut to ``limit``, and whether anything was cut.

        The text is cut at its end. Where the target goes on from the source, the words that ask for it are kept.

        Raises:
            ConfigurationError: If the limit leaves no room for the text.
        """
        if self.continued:
            text = text.rstrip()
        ids = encode(tokenizer, text)
        room = limit - len(self.before) - len(self.after)
        kept = len(encode(tokenizer, ASKS)) if self.continued and text.endswith(ASKS) else 0
        if room <= kept:
            raise ConfigurationError(
                f"A source may have {limit} tokens besides the learned instruction, and {limit - room + kept} of them "
                "open and close the prompt: raise `data.max_source_length`."
            )
        was_cut = len(ids) > room
        if was_cut:
            ids = [*ids[: room - kept], *ids[len(ids) - kept :]]
        return [*self.before, *ids, *self.after], was_cut

    def target(self, tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> tuple[list[int], bool]:
        """Return the ids of a target, cut to ``limit``, and whether anything was cut.

        Raises:
            ConfigurationError: If the tokenizer joins the target with what it goes on from.
        """
        ids = self._continuation(tokenizer, text.strip()) if self.continued else encode(tokenizer, text)
        room = limit - len(self.target_before) - len(self.target_after)
        return [*self.target_before, *ids[: max(0, room)], *self.target_after][:limit], len(ids) > room

    def _continuation(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Ids of a text as they are behind another one: many tokenizers mark the beginning of a word."""
        beginning = _ids(tokenizer, self.continued)
        whole = _ids(tokenizer, f"{self.continued}{self.separator}{text}")
        if whole[: len(beginning)] != beginning:
            raise ConfigurationError(
                f"The tokenizer joins the end of the prompt {self.continued!r} and the target {text[:60]!r} into one "
                "token, so that the target has no ids of its own: use another tokenizer, or `chat_template` if the "
                "model has one."
            )
        return _spelled_out(tokenizer, whole[len(beginning) :])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    r"""The ids of a text alone, in which the name of a special token is a word like any other.

    Texts come from strangers, and none may end a source or open another turn of a dialogue. Where a tokenizer would
    read ``</s>`` as its end token, the ids are those of its letters; all other ids are the tokenizer's own.

    Example:
        >>> from diopt_lightning.data.synthetic import word_tokenizer
        >>> tokenizer = word_tokenizer(["bear", "s"])
        >>> tokenizer.convert_ids_to_tokens(encode(tokenizer, "bear </s>"))
        ['bear', '<unk>', 's', '<unk>']
    """
    return _spelled_out(tokenizer, _ids(tokenizer, text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """The ids that the tokenizer itself gives, with special tokens where the text names them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


@lru_cache(maxsize=8)  # the list of special tokens takes longer to make than a short text to encode
def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no text may have: special tokens without the one for unknown words, which text may well have."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "sep", "cls", "mask")}
    unknown = {tokenizer.unk_token_id} - set(roles.values())
    return frozenset(special | set(tokenizer.all_special_ids)) - unknown


def _spelled_out(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Put the letters of its name in the place of every special token."""
    control = _control_ids(tokenizer)
    if control.isdisjoint(ids):
        return ids
    names = {index: str(tokenizer.convert_ids_to_tokens(index)) for index in control.intersection(ids)}
    letters = {index: _letters(tokenizer, name) for index, name in names.items()}
    return [part for index in ids for part in letters.get(index, [index])]


def _letters(tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Ids of the name of a special token that are none of a special token.

    Where even the option for that does not keep a tokenizer from finding the name, as T5's, which has it among its
    words, the name is taken apart. A single character that nothing but a special token can stand for is unknown.
    """
    control = _control_ids(tokenizer)
    ids = _ids(tokenizer, name, split_special_tokens=True)
    if control.isdisjoint(ids):
        return ids
    if len(name) > 1:
        return [*_letters(tokenizer, name[0]), *_letters(tokenizer, name[1:])]
    return [tokenizer.unk_token_id] if tokenizer.unk_token_id not in {None, *control} else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a tokenizer puts before and after every text."""
    bare, whole = _ids(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    begin = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[:begin]), tuple(whole[begin + len(bare) :])


def encoder_decoder_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """Source and target are sequences of their own, each as the tokenizer makes one."""
    before, after = special_tokens(tokenizer)
    return TextFormat(before, after, before, after)


def causal_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """The target goes on from the source's last words, ``Output:``, and ends with the end token."""
    before, _ = special_tokens(tokenizer)
    # Some tokenizers end a text too: nothing may end between source and target.
    return TextFormat(before, target_after=(tokenizer.eos_token_id,), continued=ASKS.strip(), separator=" ")


def chat_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """The source is a user's turn and the target the assistant's, by the tokenizer's chat template.

    A learned instruction stands at the beginning of the user's turn.

    Raises:
        ConfigurationError: If there is no template, or it cannot show a question and an answer.
    """
    question, answer = "QUESTION", "ANSWER"
    asked = [{"role": "user", "content": question}]
    render = cast(Callable[..., str], tokenizer.apply_chat_template)
    try:
        opening, closing = render(asked, tokenize=False, add_generation_prompt=True).split(question)
        answered = render([*asked, {"role": "assistant", "content": answer}], tokenize=False)
        _, end = answered.split(answer)
        ends = _ids(tokenizer, end)[:1]
    except (ValueError, TemplateError) as error:
        raise ConfigurationError(
            f"`chat_template` is true, and the tokenizer has no template that shows a question and an answer "
            f"({str(error).strip().splitlines()[0]}): set it to false, or use the tokenizer of a chat model."
        ) from error
    return TextFormat(
        tuple(_ids(tokenizer, opening)),
        tuple(_ids(tokenizer, closing)),
        target_after=tuple(ends or [tokenizer.eos_token_id]),
        continued=closing,
    )
