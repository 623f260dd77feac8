"""The state of every generator of a process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process, as plain data and tensors."""
    _, numbers, *rest = numpy.random.get_state()  # noqa: NPY002  (the state of the code that does not use a generator)
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [torch.from_numpy(numpy.asarray(numbers, dtype=numpy.int64)), *rest],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every generator of this process into a state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    numbers, *rest = state["numpy"]
    numpy.random.set_state(("MT19937", numbers.numpy(), *rest))  # noqa: NPY002


@contextmanager
def drawing_from(state: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Draw random numbers from an earlier state meanwhile."""
    now = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(now, device)
