"""Errors that a user can mend, and the commonest check."""


class ConfigurationError(ValueError):
    """An argument, a file or a combination of them cannot work.

    The message names the argument or file, its value, and what to do. The command line prints it without a traceback.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, through no mistake of its configuration that could have been seen before.

    The message says what happened and from where to go on. The command line prints it without a traceback.
    """


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
