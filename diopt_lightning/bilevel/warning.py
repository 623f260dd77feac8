"""What a hypergradient that should not be trusted is warned of by."""


class ConvergenceWarning(UserWarning):
    """A hypergradient should not be trusted, e.g. because its solver diverges; the message says what to set instead."""
