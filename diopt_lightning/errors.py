"""The one error for what a user can mend."""


class ConfigurationError(ValueError):
    """An argument, a file or a combination of them cannot work.

    The message names the argument or file, its value, and what to do. The command line prints it without a traceback.
    """
