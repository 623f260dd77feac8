"""How a kind of model reads texts: what stands around a source and a target, as token ids."""

from collections.abc import Callable
from dataclasses import dataclass
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
        beginning = encode(tokenizer, self.continued)
        whole = encode(tokenizer, f"{self.continued}{self.separator}{text}")
        if whole[: len(beginning)] != beginning:
            raise ConfigurationError(
                f"The tokenizer joins the end of the prompt {self.continued!r} and the target {text[:60]!r} into one "
                "token, so that the target has no ids of its own: use another tokenizer, or `chat_template` if the "
                "model has one."
            )
        return whole[len(beginning) :]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text alone."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a tokenizer puts before and after every text."""
    bare, whole = encode(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
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
        ends = encode(tokenizer, end)[:1]
    except (ValueError, TemplateError) as error:
        raise ConfigurationError(
            f"`chat_template` is true, and the tokenizer has no template that shows a question and an answer "
            f"({str(error).strip().splitlines()[0]}): set it to false, or use the tokenizer of a chat model."
        ) from error
    return TextFormat(
        tuple(encode(tokenizer, opening)),
        tuple(encode(tokenizer, closing)),
        target_after=tuple(ends or [tokenizer.eos_token_id]),
        continued=closing,
    )
