"""What a run says about itself."""

import sys

from lightning.pytorch.utilities import rank_zero_only

from diopt_lightning.errors import printable


@rank_zero_only
def say(sentence: str, below_the_bar: bool = False) -> None:
    """Say something on the standard error, on the first process; below a progress bar that may stand in the line."""
    bar = "\n" if below_the_bar else ""
    print(f"{bar}diopt: {printable(sentence)}", file=sys.stderr, flush=True)
