"""Errors that a user can mend, how they are worded, and the commonest check."""

import errno
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What disks, their limits and their owners say to a file that is written.
OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}

# What libraries raise, among others, for what they were not made for. (NotImplementedError is a RuntimeError.)
OF_A_LIBRARY = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


class ConfigurationError(ValueError):
    """An argument, a file or a combination of them cannot work.

    The message names the argument or file, its value, and what to do. The command line prints it without a traceback.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, through no mistake of its configuration that could have been seen before.

    The message says what happened and from where to go on. The command line prints it without a traceback.
    """


def printable(text: str, keep: str = "") -> str:
    r"""The text with those characters spelled out that a terminal or a page would obey and not show.

    These are control characters, such as those that move the cursor or turn the direction of writing, and halves of
    surrogate pairs, which cannot be written at all. Spaces of all kinds stay, and what is to be kept.

    Example:
        >>> print(printable("é\x1b[31m\n\u202e"), len(printable("\n", keep="\n")))
        é\x1b[31m\n\u202e 1
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


def one_line(said: object, limit: int = 300) -> str:
    r"""What a library says in many lines, in one that any terminal shows; of an error that says nothing, its name.

    Example:
        >>> one_line(ValueError("no\x1b[2J\n  such   file"))
        'no\\x1b[2J such file'
    """
    text = " ".join(str(said).split()) or type(said).__name__
    text = printable(text[: limit + 1])
    return f"{text[: limit - 3]}..." if len(text) > limit else text


@contextmanager
def users_mistake(*errors: type[Exception], what: str, then: str) -> Iterator[None]:
    """Where a library is handed what a user has given: make one sentence of what it raises for it.

    Args:
        errors: What it raises for a mistake.
        what: What was given, or cannot be done with it.
        then: What to do.

    Raises:
        ConfigurationError: In place of those errors.

    Example:
        >>> with users_mistake(ValueError, what="`rank` is `a`", then="give a number."):
        ...     int("a")
        Traceback (most recent call last):
        ...
        diopt_lightning.errors.ConfigurationError: `rank` is `a` (invalid literal for int() with base 10: 'a'): give ...
    """
    try:
        yield
    except (ConfigurationError, TrainingError, torch.OutOfMemoryError):
        raise
    except errors as error:
        kind = f"{type(error).__name__}: " if isinstance(error, LookupError | AttributeError | TypeError) else ""
        raise ConfigurationError(f"{what} ({kind}{one_line(error)}): {then}") from error


def error_of_the_disk(error: BaseException | None) -> OSError | None:
    """The error of a disk that is full, read-only or the like, from which an error comes, or ``None``."""
    while error is not None and not (isinstance(error, OSError) and error.errno in OF_THE_DISK):
        error = error.__cause__ or error.__context__
    return error


def require_at_least(least: int, of: str = "", hint: str = "", **numbers: float | None) -> None:
    """Refuse numbers, by their names as options, that are smaller than ``least``; ``None`` is one that was left out.

    The message says what they are options ``of``, and ends with the ``hint``.

    Raises:
        ConfigurationError: If one is smaller.

    Example:
        >>> require_at_least(1, of="LoRA", rank=0)
        Traceback (most recent call last):
        ...
        diopt_lightning.errors.ConfigurationError: `rank` of LoRA must be 1 or more, got 0.
    """
    for name, number in numbers.items():
        if number is not None and not number >= least:  # nor NaN
            whose, then = f" of {of}" if of else "", f" {hint}" if hint else ""
            raise ConfigurationError(f"`{name}`{whose} must be {least} or more, got {number}.{then}")
