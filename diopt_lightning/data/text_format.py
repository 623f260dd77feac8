"""How a kind of model reads texts: what stands around a source and a target, as token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from re import fullmatch
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from diopt_lightning.errors import ConfigurationError, one_line

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
        target_after: Ids after a target.
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

    @property
    def stop(self) -> int:
        """The id that ends a generated output."""
        return self.target_after[0]

    def source(self, tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> tuple[list[int], bool]:
        """Return the ids of a source, cut to ``limit``, and whether anything was cut.

        The text is cut at its end. Where the target goes on from the source, the words that ask for it are kept.

        Raises:
            ConfigurationError: If the limit leaves no room for the text.
        """
        ids, asks = self._source_ids(tokenizer, text)
        room, kept = limit - len(self.before) - len(self.after), len(encode(tokenizer, asks)) if asks else 0
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
        ids = self._target_ids(tokenizer, text)
        room = limit - len(self.target_before) - len(self.target_after)
        return [*self.target_before, *ids[: max(0, room)], *self.target_after][:limit], len(ids) > room

    def _source_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], str]:
        """Ids of a source's text, and its end that is never cut."""
        if self.continued:
            text = text.rstrip()
        return encode(tokenizer, text), ASKS if self.continued and text.endswith(ASKS) else ""

    def _target_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Ids of a target's text."""
        return self._continuation(tokenizer, text.strip()) if self.continued else encode(tokenizer, text)

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
    added = tokenizer.added_tokens_decoder.items()
    # Some tokenizers call the bytes of letters that they do not know special.
    special = {index for index, token in added if token.special and not fullmatch(r"<0x[0-9A-F]{2}>", token.content)}
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
    """Source and target are sequences of their own, each as the tokenizer makes one; a target always ends."""
    before, after = special_tokens(tokenizer)
    return TextFormat(
        before, after, before, after if tokenizer.eos_token_id in after else (*after, tokenizer.eos_token_id)
    )


def causal_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """The target goes on from the source's last words, ``Output:``, and ends with the end token."""
    before, _ = special_tokens(tokenizer)
    # Some tokenizers end a text too: nothing may end between source and target.
    return TextFormat(before, target_after=(tokenizer.eos_token_id,), continued=ASKS.strip(), separator=" ")


@dataclass(frozen=True)
class ChatFormat(TextFormat):
    """Source and target are turns of a dialogue, as a chat template writes the whole of it.

    A row is tokenized as the template's text is, in one piece: what stands between the turns, and its seams with them,
    are the template's own. A target is without white space around it.

    Args:
        stopping: The id that ends a generated output: the first special token behind an answer.
        separator: White space before an answer that the tokenizer joins with it, so that it belongs to the target.
        template: The template, for the fingerprint of what was tokenized.
        arguments: What the template is given beside the dialogue.
    """

    stopping: int = 0
    template: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """The id that ends a generated output."""
        return self.stopping

    def _source_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], str]:
        ids = _ids(tokenizer, self.prompt(tokenizer, text))
        begin, end = len(self.before), len(ids) - _common_end(ids, self.after)
        if tuple(ids[:begin]) != self.before:
            raise _refusal("opens a question otherwise than others", tokenizer, ids, self.before)
        asks = text[text.rindex(ASKS) :] if text.rstrip().endswith(ASKS) else ""
        return _spelled_out(tokenizer, ids[begin:end]), asks

    def _target_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        beginning = _ids(tokenizer, self.prompt(tokenizer, QUESTION))
        ids = _ids(tokenizer, _dialogue(tokenizer, self.arguments, QUESTION, text.strip()))
        if ids[: len(beginning)] != beginning:
            raise _refusal(f"joins the answer {text[:60]!r} with what is before it", tokenizer, ids, beginning)
        ids = ids[len(beginning) :]
        return _spelled_out(tokenizer, ids[: len(ids) - _common_end(ids, self.target_after)])

    def prompt(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """What the template writes before an answer to a text."""
        return _dialogue(tokenizer, self.arguments, text, ANSWER).rpartition(ANSWER)[0].removesuffix(self.separator)


QUESTION, ANSWER = f"QUESTION{ASKS}", "ANSWER"
# What texts begin and end with decides what a tokenizer makes of the seams.
QUESTIONS = (QUESTION, "7 + x (", " Positive.\nOutput: ", "\u597d?")
ANSWERS = (ANSWER, "7.", "(no)", "\u597d", "the answer")


def chat_format(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> ChatFormat:
    """The source is a user's turn and the target the assistant's, by the tokenizer's chat template.

    A learned instruction stands at the beginning of the user's turn.

    Args:
        tokenizer: The tokenizer.
        arguments: What the template is given beside the dialogue, e.g. ``{"enable_thinking": False}``.

    Raises:
        ConfigurationError: If there is no template, or it cannot show a question and an answer, or rows would differ
            from what the tokenizer makes of the whole dialogue.
    """
    arguments = arguments or {}
    whole = _dialogue(tokenizer, arguments, QUESTION, ANSWER)
    opening, question, rest = whole.partition(QUESTION)
    closing, answer, end = rest.partition(ANSWER)
    if not question or not answer or QUESTION in rest or ANSWER in end:
        raise _no_template(f"it writes {whole[:200]!r} of the question {QUESTION!r} and the answer {ANSWER!r}")
    dialogues = [_ids(tokenizer, _dialogue(tokenizer, arguments, QUESTION, answer)) for answer in ANSWERS]
    for separator in ("", closing[len(closing.rstrip(" ")) :], closing[len(closing.rstrip()) :]):
        beginning = _ids(tokenizer, whole[: len(opening + QUESTION + closing) - len(separator)])
        if all(ids[: len(beginning)] == beginning for ids in dialogues):
            break
    ending = _ids(tokenizer, end)
    ending = ending[len(ending) - min(_common_end(ids, ending) for ids in dialogues) :]
    stops = [index for index in ending if index in _control_ids(tokenizer)]
    if not stops:
        raise _no_template(f"no special token ends an answer, behind which it writes {end!r}")
    made = ChatFormat(
        separator=separator,
        target_after=tuple(ending),
        stopping=stops[0],
        template=str(tokenizer.get_chat_template(arguments.get("chat_template"))),
        arguments=dict(arguments),
    )
    sources = [_ids(tokenizer, made.prompt(tokenizer, text)) for text in QUESTIONS]
    before, after = _ids(tokenizer, opening), _ids(tokenizer, closing.removesuffix(separator))
    before = before[: min(_common_start(ids, before) for ids in sources)]
    after = after[len(after) - min(_common_end(ids, after) for ids in sources) :]
    made = replace(made, before=tuple(before), after=tuple(after))
    for text, answer in zip((*QUESTIONS, QUESTION), ANSWERS, strict=True):
        ours = made.source(tokenizer, text, 10**6)[0] + made.target(tokenizer, answer, 10**6)[0]
        theirs = _ids(tokenizer, _dialogue(tokenizer, arguments, text, answer))
        if ours != theirs:
            raise _refusal("cannot be taken apart into a question and an answer", tokenizer, theirs, ours)
    return made


def _dialogue(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], question: str, answer: str) -> str:
    """A dialogue of two turns as the template writes it."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return cast(Callable[..., str], tokenizer.apply_chat_template)(turns, tokenize=False, **arguments)
    except Exception as error:  # a template raises what it likes
        raise _no_template(one_line(error)) from error


def _common_start(ids: Sequence[int], others: Sequence[int]) -> int:
    """With how many ids both begin."""
    differ = (place for place, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    return next(differ, min(len(ids), len(others)))


def _common_end(ids: Sequence[int], others: Sequence[int]) -> int:
    """With how many ids both end."""
    return _common_start(ids[::-1], others[::-1])


def _no_template(why: str) -> ConfigurationError:
    return ConfigurationError(
        f"`chat_template` is true, and the tokenizer has no template that shows a question and an answer ({why}): set "
        "it to false, or use the tokenizer of a chat model."
    )


def _refusal(
    what: str, tokenizer: PreTrainedTokenizerBase, theirs: Sequence[int], ours: Sequence[int]
) -> ConfigurationError:
    same = _common_start(theirs, ours)
    shown = [tokenizer.convert_ids_to_tokens(list(ids[max(same - 2, 0) : same + 6])) for ids in (theirs, ours)]
    return ConfigurationError(
        f"The chat template {what}: {shown[0]} stands where {shown[1]} is expected, {same} tokens from the beginning; "
        "set `chat_template` to false, or give `template_arguments` or a template that differ."
    )
