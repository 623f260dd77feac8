"""The one error for what a user can mend."""


class ConfigurationError(ValueError):
    """An argument, a file or a combination of them cannot work.

    The message names the argument or file, its value, and what to do. The command line prints it without a traceback.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, through no mistake of its configuration that could have been seen before.

    The message says what happened and from where to go on. The command line prints it without a traceback.
    """
